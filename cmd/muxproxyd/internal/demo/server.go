package demo

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"
)

// server is an SSH server on loopback that runs commands for whoever has the one key that it was made with.
type server struct {
	ln     net.Listener
	config *ssh.ServerConfig
	host   ssh.Signer
	wg     sync.WaitGroup  // everything that the server started
	ctx    context.Context // of the commands
	cancel context.CancelFunc

	mu    sync.Mutex // guards all below
	conns map[net.Conn]bool
	total int
	over  bool
}

// startServer starts a server on a free port and returns it with a client's private key in OpenSSH's format. Both keys
// are new. The caller closes the server.
func startServer() (*server, []byte, error) {
	hostKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	host, err := ssh.NewSignerFromKey(hostKey)
	if err != nil {
		return nil, nil, err
	}
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	client, err := ssh.NewPublicKey(public)
	if err != nil {
		return nil, nil, err
	}
	block, err := ssh.MarshalPrivateKey(private, "muxproxy demo")
	if err != nil {
		return nil, nil, err
	}
	s := &server{host: host, conns: map[net.Conn]bool{}}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.config = &ssh.ServerConfig{
		PublicKeyCallback: func(_ ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
			if !bytes.Equal(key.Marshal(), client.Marshal()) {
				return nil, errors.New("another key")
			}
			return nil, nil
		},
	}
	s.config.AddHostKey(host)
	if s.ln, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		s.cancel()
		return nil, nil, err
	}
	s.wg.Go(s.accept)
	return s, pem.EncodeToMemory(block), nil
}

func (s *server) port() int { return s.ln.Addr().(*net.TCPAddr).Port }

// hostKey is the public half, as a line of known_hosts has it after the name.
func (s *server) hostKey() []byte { return ssh.MarshalAuthorizedKey(s.host.PublicKey()) }

// count is how many TCP connections were accepted so far.
func (s *server) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.total
}

// close ends every connection and command and returns when they have ended.
func (s *server) close() {
	s.cancel()
	s.ln.Close()
	s.mu.Lock()
	s.over = true
	for c := range s.conns {
		c.Close()
	}
	s.mu.Unlock()
	s.wg.Wait()
}

func (s *server) accept() {
	for {
		c, err := s.ln.Accept()
		if err != nil {
			return
		}
		s.mu.Lock()
		if s.over {
			s.mu.Unlock()
			c.Close()
			return
		}
		s.total++
		s.conns[c] = true
		s.mu.Unlock()
		s.wg.Go(func() {
			s.serve(c)
			s.mu.Lock()
			delete(s.conns, c)
			s.mu.Unlock()
		})
	}
}

// serve serves one connection until it ends.
func (s *server) serve(c net.Conn) {
	defer c.Close()
	conn, channels, requests, err := ssh.NewServerConn(c, s.config)
	if err != nil {
		return
	}
	defer conn.Close()
	var below sync.WaitGroup
	defer below.Wait()
	below.Go(func() { ssh.DiscardRequests(requests) })
	for offer := range channels {
		switch offer.ChannelType() {
		case "session":
		case "direct-tcpip":
			below.Go(func() { web(offer) })
			continue
		default:
			offer.Reject(ssh.UnknownChannelType, "this server has sessions and one web page")
			continue
		}
		ch, requests, err := offer.Accept()
		if err != nil {
			continue
		}
		below.Go(func() { session(s.ctx, ch, requests) })
	}
}

// web serves a direct-tcpip channel (RFC 4254 section 7.2) to the only place that this server can reach.
func web(offer ssh.NewChannel) {
	var to struct {
		Host       string
		Port       uint32
		Origin     string
		OriginPort uint32
	}
	if ssh.Unmarshal(offer.ExtraData(), &to) != nil || to.Host != site || to.Port != 80 {
		offer.Reject(ssh.ConnectionFailed, "there is no such place")
		return
	}
	ch, requests, err := offer.Accept()
	if err != nil {
		return
	}
	go ssh.DiscardRequests(requests) // ends with the channel
	defer ch.Close()
	if _, err := http.ReadRequest(bufio.NewReader(ch)); err != nil {
		return
	}
	fmt.Fprintf(ch, "HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n%s\n", len(greet)+1, greet)
	ch.CloseWrite()
}

// session serves one session channel, RFC 4254 section 6: environment, one command or shell, its streams and its exit
// status. There are no terminals and no subsystems.
func session(ctx context.Context, ch ssh.Channel, requests <-chan *ssh.Request) {
	var below sync.WaitGroup
	// When the client has gone, its command sees an end of input, as it does with sshd where there is no terminal.
	defer below.Wait()
	defer ch.Close()
	var env []string
	started := false
	for r := range requests {
		switch {
		case r.Type == "env" && !started:
			var v struct{ Name, Value string }
			ok := ssh.Unmarshal(r.Payload, &v) == nil
			if ok {
				env = append(env, v.Name+"="+v.Value)
			}
			r.Reply(ok, nil)
		case (r.Type == "exec" || r.Type == "shell") && !started:
			var v struct{ Command string }
			if r.Type == "exec" && ssh.Unmarshal(r.Payload, &v) != nil {
				r.Reply(false, nil)
				continue
			}
			cmd := command(ctx, v.Command)
			cmd.Env = append(os.Environ(), env...)
			started = true
			r.Reply(true, nil)
			below.Go(func() { run(cmd, ch) })
		default:
			r.Reply(false, nil)
		}
	}
}

// command is what a shell makes of a command line, until ctx ends; "": the shell itself, on its standard input.
func command(ctx context.Context, line string) *exec.Cmd {
	args := []string{"-c", line}
	if line == "" {
		args = nil
	}
	cmd := exec.CommandContext(ctx, "/bin/sh", args...)
	cmd.WaitDelay = time.Second // what it leaves behind may hold its output; nobody waits for that
	return cmd
}

// run runs a command on a channel, sends its exit status, 255 if it has none, and closes the channel. It returns when
// the client has closed it, too.
func run(cmd *exec.Cmd, ch ssh.Channel) {
	status := uint32(255)
	var input sync.WaitGroup
	defer input.Wait()
	defer func() {
		ch.SendRequest("exit-status", false, ssh.Marshal(struct{ Status uint32 }{status}))
		ch.Close()
	}()
	in, err := cmd.StdinPipe()
	if err == nil {
		cmd.Stdout, cmd.Stderr = ch, ch.Stderr()
		err = cmd.Start()
	}
	if err != nil {
		io.WriteString(ch.Stderr(), err.Error()+"\n")
		return
	}
	input.Go(func() {
		io.Copy(in, ch) // ends early if the command does
		in.Close()
	})
	err = cmd.Wait()
	ch.CloseWrite()
	var exit *exec.ExitError
	switch {
	case err == nil:
		status = 0
	case errors.As(err, &exit) && exit.ExitCode() >= 0:
		status = uint32(exit.ExitCode())
	}
}
