//go:build linux

package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"time"

	"github.com/muxproxy/muxproxy/bench/link"
)

const (
	echoRTT       = 40 * time.Millisecond
	echoBandwidth = 20e6
	// plainQueue is Linux's default: 1000 packets (txqueuelen).
	plainQueue = 1000 * 1500
	// fairQueue is what CoDel leaves of a connection's queue at this bandwidth: about 25 ms.
	fairQueue = 64 << 10
	// echoPatience bounds the wait for one byte.
	echoPatience = 20 * time.Second
)

// load is what else goes over the connection, for as long as it is measured.
type load struct {
	name string
	cmd  func(w *world, by way) (*exec.Cmd, func(), error) // nil: nothing
}

var loads = []load{
	{"idle", nil},
	{"download", func(w *world, by way) (*exec.Cmd, func(), error) {
		return w.ssh(by, "box", "exec cat /dev/zero"), func() {}, nil
	}},
	{"upload", func(w *world, by way) (*exec.Cmd, func(), error) {
		cmd := w.ssh(by, "box", "exec cat >/dev/null")
		zero, err := os.Open("/dev/zero")
		if err != nil {
			return nil, nil, err
		}
		cmd.Stdin = zero
		return cmd, func() { zero.Close() }, nil
	}},
	{"scp", func(w *world, by way) (*exec.Cmd, func(), error) {
		return w.command("scp", "-q", "-F", w.path(confName(by)), "box:"+w.path("large"), "/dev/null"), func() {}, nil
	}},
}

// echo types into a remote terminal, one byte at a time, and waits for each to come back.
func echo(ctx context.Context, b *bench) error {
	ways, loads := allWays, loads
	if b.quick {
		ways, loads = []way{controlMaster, fdpass}, []load{loads[0], loads[3]}
	}
	for _, q := range []struct {
		name string
		link link.Config
	}{
		{"fair", link.Config{RTT: echoRTT, Bandwidth: echoBandwidth, Queue: fairQueue, Fair: true}},
		{"plain", link.Config{RTT: echoRTT, Bandwidth: echoBandwidth, Queue: plainQueue}},
	} {
		if err := b.inWorld(ctx, setting{link: &q.link}, func(w *world) error { return w.echoes(ctx, ways, loads, q.name) }); err != nil {
			return err
		}
	}
	return nil
}

func (w *world) echoes(ctx context.Context, ways []way, loads []load, queue string) error {
	b := w.b
	if _, err := w.holdAll(ctx, ways); err != nil {
		return err
	}
	if err := w.run(ctx, "truncate", "-s", "16G", w.path("large")); err != nil {
		return err
	}
	typist := map[way]*session{}
	for _, by := range ways {
		s, err := w.open(ctx, by, "-tt", "box", "stty raw -echo; echo ready; exec cat")
		if err != nil {
			return err
		}
		defer s.close()
		typist[by] = s
	}
	type pair struct{ p50, p99 *measure }
	var idle pair
	for _, l := range loads {
		name := fmt.Sprintf("echo, %s queue, %s, ", queue, l.name)
		m := pair{b.add(name+"p50", "ms", nil), b.add(name+"p99", "ms", nil)}
		if l.cmd == nil {
			idle = m
		} else if queue == "fair" && l.name == "scp" {
			m.p50.Goal = &goal{Op: "<=", Bound: 1.1, Of: "idle", Base: idle.p50.Values}
		}
		err := b.turns(b.rounds(3, 1), ways, func(_ int, by way) error {
			times, err := w.typeUnder(ctx, typist[by], l, by)
			if err != nil {
				return fmt.Errorf("%s, %s: %w", name, by, err)
			}
			m.p50.put(by, quantile(times, 0.5))
			m.p99.put(by, quantile(times, 0.99))
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// typeUnder returns how many milliseconds each byte took while a load ran.
func (w *world) typeUnder(ctx context.Context, s *session, l load, by way) ([]float64, error) {
	lasting := 4 * time.Second
	if w.b.quick {
		lasting = 1500 * time.Millisecond
	}
	if l.cmd == nil {
		return s.typing(ctx, lasting)
	}
	cmd, release, err := l.cmd(w, by)
	if err != nil {
		return nil, err
	}
	p, err := w.start(cmd)
	release()
	if err != nil {
		return nil, err
	}
	defer p.kill()
	warm := 2 * time.Second // until every queue on the way is full
	if w.b.quick {
		warm = time.Second
	}
	select {
	case <-p.done:
		return nil, fmt.Errorf("the load has ended: %w", p.err)
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-time.After(warm):
	}
	times, err := s.typing(ctx, lasting)
	select {
	case <-p.done:
		if err == nil {
			err = fmt.Errorf("the load has ended: %w", p.err)
		}
	default:
	}
	if err != nil {
		return nil, err
	}
	// What the load left on the way is the next one's otherwise.
	p.kill()
	for calm := 0; calm < 3; {
		d, err := s.byte(ctx)
		if err != nil {
			return nil, err
		}
		if calm++; d > 2*echoRTT {
			calm = 0
		}
	}
	return times, nil
}

// typing types for a while, as fast as a person at most.
func (s *session) typing(ctx context.Context, lasting time.Duration) ([]float64, error) {
	var all []float64
	for end := time.Now().Add(lasting); time.Now().Before(end) || len(all) < 5; {
		d, err := s.byte(ctx)
		if err != nil {
			return nil, err
		}
		all = append(all, float64(d)/float64(time.Millisecond))
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(20*time.Millisecond + rand.N(40*time.Millisecond)):
		}
	}
	return all, nil
}

// byte types one byte and waits for it.
func (s *session) byte(ctx context.Context) (time.Duration, error) {
	stop := context.AfterFunc(ctx, func() { s.out.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	s.out.SetReadDeadline(time.Now().Add(echoPatience))
	start := time.Now()
	if _, err := s.in.Write([]byte("x")); err != nil {
		return 0, err
	}
	if _, err := s.buf.ReadByte(); err != nil {
		return 0, fmt.Errorf("no echo: %w: %s", err, s.errs)
	}
	return time.Since(start), nil
}
