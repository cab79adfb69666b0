//go:build linux

package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/muxproxy/muxproxy/core/plugin"
)

// meter is a plugin that allows everything, and reads and writes streams for its own sake. This program plays it.
type meter struct{ host *plugin.Host }

type meterBlock struct{}

func (*meter) Describe() plugin.Info {
	return plugin.Info{
		Name: "meter", Version: "1", Host: meterBlock{}, Wants: []plugin.Capability{plugin.CanConnect, plugin.CanDial},
		Verbs: []plugin.Verb{{Usage: "up|down HOST ADDRESS SIZE", Doc: "move so many bytes"}},
	}
}

func (m *meter) Configure(_ context.Context, c *plugin.Config) plugin.Diagnostics {
	m.host = c.Host
	return nil
}

func (*meter) Authorize(context.Context, *plugin.Request) plugin.Decision { return plugin.Allow() }

// Command moves bytes through a stream of Dial, and prints how many seconds that took.
func (m *meter) Command(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	took, err := m.move(ctx, args)
	if err != nil {
		fmt.Fprintln(stderr, err)
		return 1
	}
	fmt.Fprintln(stdout, took.Seconds())
	return 0
}

func (m *meter) move(ctx context.Context, args []string) (time.Duration, error) {
	if len(args) != 4 {
		return 0, fmt.Errorf("usage: meter up|down HOST ADDRESS SIZE")
	}
	size, err := strconv.ParseInt(args[3], 10, 64)
	if err != nil {
		return 0, err
	}
	c, err := m.host.Connect(ctx, args[1])
	if err != nil {
		return 0, err
	}
	s, err := m.host.Dial(ctx, c.ID, "tcp", args[2])
	if err != nil {
		return 0, err
	}
	defer s.Close()
	return transfer(s.UnixConn, args[0], size)
}

// halfCloser is a stream that can be closed for writing.
type halfCloser interface {
	net.Conn
	CloseWrite() error
}

// transfer reads size bytes from c, or writes them and waits for the one byte that says that all have come.
func transfer(c halfCloser, direction string, size int64) (time.Duration, error) {
	if err := c.SetDeadline(time.Now().Add(2 * patience)); err != nil {
		return 0, err
	}
	if _, err := fmt.Fprintf(c, "%s %d\n", direction, size); err != nil {
		return 0, err
	}
	began := time.Now()
	buffer := make([]byte, 128<<10)
	want := size
	if direction == "up" {
		want = 1
		for left := size; left > 0; {
			n, err := c.Write(buffer[:min(left, int64(len(buffer)))])
			if err != nil {
				return 0, err
			}
			left -= int64(n)
		}
	}
	got, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{c}, buffer)
	if err == nil && got != want {
		err = fmt.Errorf("%d bytes instead of %d", got, want)
	}
	return time.Since(began), err
}

// source is the other end of transfer. It serves until it is closed.
func source() (*net.TCPListener, error) {
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return nil, err
	}
	go func() { // ends with l
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				var direction string
				var size int64
				if _, err := fmt.Fscanf(unread{c}, "%s %d\n", &direction, &size); err != nil {
					return
				}
				buffer := make([]byte, 128<<10)
				if direction == "up" {
					n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, io.LimitReader(c, size), buffer)
					if err == nil && n == size {
						_, _ = c.Write([]byte{0}) // the other end counts
					}
					return
				}
				for left := size; left > 0; {
					n, err := c.Write(buffer[:min(left, int64(len(buffer)))])
					if err != nil {
						return
					}
					left -= int64(n)
				}
			}()
		}
	}()
	return l, nil
}

// unread is a reader of single bytes, so that Fscanf takes no more than its line.
type unread struct{ io.Reader }

func (u unread) Read(b []byte) (int, error) { return u.Reader.Read(b[:min(1, len(b))]) }

// policy puts a policy in force in which this program is the plugin "meter", of one host.
func (w *world) policy(ctx context.Context, host string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	return w.writePolicy(ctx, fmt.Sprintf("master {\n  ssh_config = %q\n}\nplugin \"meter\" {\n  path = %q\n  may = [\"connect\", \"dial\"]\n}\nhost %q {\n  meter {}\n}\n",
		w.path(confName(pipes)), self, host))
}

// writePolicy puts a policy in force.
func (w *world) writePolicy(ctx context.Context, text string) error {
	dir := w.path("config/muxproxy")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "config.hcl"), []byte(text), 0o600); err != nil {
		return err
	}
	return w.run(ctx, filepath.Join(w.b.bin, "muxproxy"), "master", "reload")
}

// judged is what a plugin that is asked costs a shared command: two names of one host, of which one has the plugin's
// block. The difference is a few percent of what one command takes, so there are many, in turns.
func judged(ctx context.Context, b *bench) error {
	return b.inWorld(ctx, setting{}, func(w *world) error {
		if err := w.policy(ctx, "127.0.0.1"); err != nil {
			return err
		}
		hosts := []string{"box", "twin"}
		for _, by := range ours {
			for _, host := range hosts {
				s, err := w.open(ctx, by, host, "echo ready; exec cat")
				if err != nil {
					return err
				}
				w.keep(s)
			}
		}
		m := b.add("one plugin that is asked adds to ssh host true", "ms", atMost(1.5))
		return b.turns(b.rounds(30, 3), ours, func(_ int, by way) error {
			var added []float64
			for i := range 10 {
				took := map[string]float64{}
				for j := range hosts {
					host := hosts[(i+j)%2]
					ms, err := w.timed(ctx, w.ssh(by, host, "true"))
					if err != nil {
						return err
					}
					took[host] = ms
				}
				added = append(added, took["box"]-took["twin"])
			}
			m.put(by, median(added))
			return nil
		})
	})
}

// dialled is a stream of a plugin's Dial beside ssh -L.
func dialled(ctx context.Context, b *bench) error {
	return b.inWorld(ctx, setting{}, func(w *world) error {
		l, err := source()
		if err != nil {
			return err
		}
		defer l.Close()
		if _, err := w.hold(ctx, pipes); err != nil {
			return err
		}
		if err := w.policy(ctx, "127.0.0.1"); err != nil {
			return err
		}
		address, stop, err := w.forward(ctx, "-L", ":"+l.Addr().String())
		if err != nil {
			return err
		}
		defer stop()
		size := int64(b.rounds(512, 128)) << 20
		for _, d := range []string{"down", "up"} {
			m := b.add("a plugin's stream "+d+", against ssh -L", "MiB/s", nil)
			err := b.turns(b.rounds(7, 2), []way{plain, pipes}, func(_ int, by way) error {
				var seconds float64
				if by == plain {
					c, err := net.Dial("tcp", address)
					if err != nil {
						return err
					}
					defer c.Close()
					took, err := transfer(c.(*net.TCPConn), d, size)
					if err != nil {
						return fmt.Errorf("ssh -L: %w", err)
					}
					seconds = took.Seconds()
				} else {
					cmd := w.command(filepath.Join(b.bin, "muxproxy"), "meter", d, "box", l.Addr().String(), strconv.FormatInt(size, 10))
					out, err := cmd.Output()
					if err != nil {
						return fmt.Errorf("muxproxy meter: %w", err)
					}
					if _, err := fmt.Sscan(string(out), &seconds); err != nil {
						return err
					}
				}
				m.put(by, float64(size)/(1<<20)/seconds)
				return nil
			})
			if err != nil {
				return err
			}
			m.Goal = &goal{Op: ">=", Bound: 0.9, Of: "ssh -L", Base: map[way][]float64{pipes: m.Values[plain]}}
		}
		return nil
	})
}

// forward starts an ssh -N with -L or -D, and returns when it listens.
func (w *world) forward(ctx context.Context, option, to string) (address string, stop func(), err error) {
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, err
	}
	address = free.Addr().String()
	free.Close()
	p, err := w.start(w.ssh(plain, "-N", "-o", "ExitOnForwardFailure=yes", option, address+to, "box"))
	if err != nil {
		return "", nil, err
	}
	for end := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) { // until it listens
		c, err := net.Dial("tcp", address)
		if err == nil {
			c.Close()
			return address, p.kill, nil
		}
		if time.Now().After(end) || ctx.Err() != nil {
			p.kill()
			return "", nil, fmt.Errorf("ssh %s: %w", option, err)
		}
	}
}
