//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/muxproxy/muxproxy/bench/link"
)

// bulk sends one large stream over a shared connection.
func bulk(ctx context.Context, b *bench) error {
	return streams(ctx, b, nil, "loopback", int64(b.rounds(512, 96))<<20, b.rounds(7, 3))
}

func bulkLink(ctx context.Context, b *bench) error {
	c := &link.Config{RTT: 20 * time.Millisecond, Bandwidth: 1e9}
	return streams(ctx, b, c, "1 Gbit/s, 20ms", int64(b.rounds(256, 32))<<20, b.rounds(5, 2))
}

func streams(ctx context.Context, b *bench, c *link.Config, where string, size int64, rounds int) error {
	return b.inWorld(ctx, setting{link: c}, func(w *world) error {
		held, err := w.holdAll(ctx, allWays)
		if err != nil {
			return err
		}
		for _, d := range []string{"down", "up"} {
			speed := b.add("bulk "+d+", "+where, "MiB/s", nil)
			var least, local, server *measure
			ways := allWays
			if c == nil {
				ways = append(slices.Clone(allWays), bare)
				speed.Goal = atLeastOfControlMaster(0.9)
				least = b.add("bulk "+d+", "+where+", a bare relay of x/crypto/ssh", "MiB/s", nil)
				local = b.add("processor time, bulk "+d+", local side", "s/GiB", nil)
				server = b.add("processor time, bulk "+d+", sshd's side", "s/GiB", nil)
			}
			err := b.turns(rounds, ways, func(_ int, by way) error {
				s, err := w.stream(ctx, by, d, size, held[by])
				if err != nil {
					return err
				}
				rate := float64(size) / (1 << 20) / s.took.Seconds()
				if by == bare { // it speaks with ssh through pipes; what it used is not known
					least.put(pipes, rate)
					return nil
				}
				speed.put(by, rate)
				if c == nil {
					perGiB := float64(1<<30) / float64(size)
					local.put(by, s.local.Seconds()*perGiB)
					server.put(by, s.server.Seconds()*perGiB)
				}
				return nil
			})
			if err != nil {
				return err
			}
			if least != nil {
				least.Values[controlMaster] = speed.Values[controlMaster] // to be compared with
			}
		}
		return nil
	})
}

// streamed is what a stream took.
type streamed struct {
	took          time.Duration // from its first byte to the end of its ssh
	local, server time.Duration // processor time: of ssh, bridge and whatever shares the connection; of sshd and its command
}

// stream sends size bytes one way. The clock starts when the remote command has.
func (w *world) stream(ctx context.Context, by way, direction string, size int64, held *session) (streamed, error) {
	sharer := 0
	switch {
	case by == controlMaster:
		sharer = held.pid()
	case by != plain && by != bare:
		sharer = w.master
	}
	var before stat
	var err error
	if sharer != 0 {
		if before, err = readStat(sharer); err != nil {
			return streamed{}, err
		}
	}
	serverBefore := treeCPU(w.sshd.pid())

	// The remote side says on stderr that it is there, since stdout may be what is measured.
	ready, say, err := os.Pipe()
	if err != nil {
		return streamed{}, err
	}
	defer ready.Close()
	command := fmt.Sprintf("echo ready >&2; exec head -c %d /dev/zero", size)
	if direction == "up" {
		command = "echo ready >&2; exec cat >/dev/null"
	}
	cmd := w.ssh(by, "box", command)
	cmd.Stderr = say
	var source *os.File
	if direction == "up" {
		var from *os.File
		if from, source, err = os.Pipe(); err != nil {
			say.Close()
			return streamed{}, err
		}
		cmd.Stdin = from
		defer from.Close()
		defer source.Close()
	}
	p, err := w.start(cmd)
	say.Close()
	if err != nil {
		return streamed{}, err
	}
	ready.SetReadDeadline(time.Now().Add(patience))
	said := make([]byte, 512)
	if n, err := ready.Read(said); err != nil || string(said[:n]) != "ready\n" {
		p.kill()
		return streamed{}, errors.Join(fmt.Errorf("%s: no session: %q", by, said[:n]), err)
	}
	began := time.Now()
	if source != nil {
		zeros := w.command("head", "-c", fmt.Sprint(size), "/dev/zero")
		zeros.Stdout = source
		head, err := w.start(zeros)
		source.Close()
		if err != nil {
			p.kill()
			return streamed{}, err
		}
		if err := head.wait(ctx); err != nil {
			p.kill()
			return streamed{}, err
		}
	}
	if err := p.wait(ctx); err != nil {
		return streamed{}, err
	}
	s := streamed{took: time.Since(began), local: p.cpu(), server: treeCPU(w.sshd.pid()) - serverBefore}
	if sharer != 0 {
		after, err := readStat(sharer)
		if err != nil {
			return streamed{}, err
		}
		s.local += after.own - before.own
	}
	return s, nil
}
