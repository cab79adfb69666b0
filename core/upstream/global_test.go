package upstream

import (
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/muxproxy/muxproxy/core/pool"
)

// mute is a server that answers a global request only when it is told to.
type mute struct {
	ssh.Conn
	t       *transport
	far     net.Conn
	refuses bool          // channels; else it says nothing at all
	answer  chan struct{} // a value for each answer
	ended   chan struct{}
}

// muteConn is a connection to one, in a bubble of its own.
func muteConn(refuses bool) (*conn, *mute) {
	near, far := net.Pipe()
	m := &mute{t: newTransport(near, "h:22"), far: far, refuses: refuses, answer: make(chan struct{}), ended: make(chan struct{})}
	channels, requests := make(chan ssh.NewChannel), make(chan *ssh.Request)
	close(channels)
	close(requests)
	c := newConn(m, channels, requests, m.t, pool.ServerInfo{})
	c.start(15*time.Second, 3)
	return c, m
}

func (m *mute) SendRequest(_ string, wantReply bool, _ []byte) (bool, []byte, error) {
	if !wantReply {
		return false, nil, nil
	}
	select {
	case <-m.answer:
		return true, nil, nil
	case <-m.ended:
		return false, nil, io.EOF
	}
}

func (m *mute) OpenChannel(string, []byte) (ssh.Channel, <-chan *ssh.Request, error) {
	if m.refuses {
		m.far.Write([]byte{1})
		return nil, nil, &ssh.OpenChannelError{Reason: ssh.UnknownChannelType}
	}
	<-m.ended
	return nil, nil, io.EOF
}

func (m *mute) Wait() error {
	_, err := io.Copy(io.Discard, m.t)
	close(m.ended)
	return err
}

// A server that does not answer one global request keeps nobody waiting for ever, and lives as long as it answers
// something else.
func TestARequestThatIsNeverAnswered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, m := muteConn(true)
		first := make(chan error, 1)
		go func() {
			_, _, err := c.SendRequest("hostkeys-prove-00@openssh.com", true, nil)
			first <- err
		}()
		synctest.Wait()
		began := time.Now()
		for range 2 { // the second one does not wait any more
			_, _, err := c.SendRequest("tcpip-forward", true, nil)
			var e *Error
			if !errors.As(err, &e) || !strings.Contains(err.Error(), "has not answered the request hostkeys-prove-00@openssh.com") {
				t.Errorf("got %v", err)
			}
			if waited := time.Since(began); waited != replyTime {
				t.Errorf("waited %v", waited)
			}
		}
		if _, _, err := c.SendRequest("cancel-tcpip-forward", false, nil); err != nil {
			t.Errorf("a request without a reply: %v", err)
		}
		time.Sleep(time.Hour)
		if c.Down() {
			t.Errorf("ended: %v", c.Cause())
		}
		if silent := time.Since(c.LastHeard()); silent > 2*15*time.Second {
			t.Errorf("nothing was heard for %v", silent)
		}
		check(t, c.Probe(t.Context(), nil))

		// It answers after all.
		m.answer <- struct{}{}
		check(t, <-first)
		go func() { m.answer <- struct{}{} }()
		ok, _, err := c.SendRequest("tcpip-forward", true, nil)
		if !ok || err != nil {
			t.Errorf("got %t, %v", ok, err)
		}

		waiting := make(chan error, 2)
		for range 2 {
			go func() {
				_, _, err := c.SendRequest("tcpip-forward", true, nil)
				waiting <- err
			}()
		}
		synctest.Wait()
		c.Close()
		for range 2 {
			if err := <-waiting; err == nil {
				t.Error("a request outlived the connection")
			}
		}
		c.Wait()
	})
}

func TestAServerThatAnswersNothingIsDead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _ := muteConn(false)
		began := time.Now()
		go c.SendRequest("hostkeys-prove-00@openssh.com", true, nil)
		if err := c.Wait(); err == nil || !strings.Contains(err.Error(), "no answer to 3 keepalives in 45s") {
			t.Errorf("got %v", err)
		}
		if took := time.Since(began); took != time.Minute {
			t.Errorf("noticed after %v", took)
		}
	})
}
