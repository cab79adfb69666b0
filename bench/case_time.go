//go:build linux

package main

import (
	"context"
	"fmt"
	"path/filepath"
	"strconv"
	"time"

	"github.com/muxproxy/muxproxy/bench/link"
)

// distances are the round trips of the cases about single commands.
var distances = []time.Duration{0, 20 * time.Millisecond, 100 * time.Millisecond}

// far is a link of this round trip and no other limit; nil without one.
func far(rtt time.Duration) *link.Config {
	if rtt == 0 {
		return nil
	}
	return &link.Config{RTT: rtt}
}

func place(rtt time.Duration) string {
	if rtt == 0 {
		return "loopback"
	}
	return rtt.String()
}

// shared is a command over a connection that is up.
func shared(ctx context.Context, b *bench) error {
	goals := map[time.Duration]*goal{0: atMostOfControlMaster(2), 100 * time.Millisecond: atMostOfControlMaster(0.6)}
	for _, rtt := range distances {
		err := b.inWorld(ctx, setting{link: far(rtt)}, func(w *world) error {
			if _, err := w.holdAll(ctx, allWays); err != nil {
				return err
			}
			m := b.add("ssh host true, shared, "+place(rtt), "ms", goals[rtt])
			return b.turns(b.rounds(15, 5), allWays, func(_ int, by way) error {
				ms, err := w.timed(ctx, w.ssh(by, "box", "true"))
				m.put(by, ms)
				return err
			})
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// first is a command to a host that nobody has logged in to, with muxproxy's master up.
func first(ctx context.Context, b *bench) error {
	for _, rtt := range distances {
		err := b.inWorld(ctx, setting{link: far(rtt)}, func(w *world) error {
			m := b.add("ssh host true, first, "+place(rtt), "ms", nil)
			return b.turns(b.rounds(9, 2), allWays, func(_ int, by way) error {
				args := []string{"box", "true"}
				if by == controlMaster {
					args = append([]string{"-o", "ControlMaster=yes"}, args...)
				}
				ms, err := w.timed(ctx, w.ssh(by, args...))
				if err != nil {
					return err
				}
				m.put(by, ms)
				return w.run(ctx, filepath.Join(b.bin, "muxproxy"), "close", "--all") // the last one's may be kept
			})
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// inWorld makes a world, has f measure in it, and ends it.
func (b *bench) inWorld(ctx context.Context, s setting, f func(w *world) error) error {
	w, err := b.newWorld(ctx, s)
	if err != nil {
		return err
	}
	err = f(w)
	if err1 := w.close(); err == nil {
		err = err1
	}
	return err
}

// gitFetch is a fetch into an empty repository.
func gitFetch(ctx context.Context, b *bench) error {
	return b.inWorld(ctx, setting{link: far(50 * time.Millisecond)}, func(w *world) error {
		if _, err := w.holdAll(ctx, allWays); err != nil {
			return err
		}
		repo := w.path("repo")
		script := `git init -q -b main "$0" && cd "$0" && for i in 1 2 3 4 5 6 7 8 9 10; do
			echo $i >file$i && git add . && git commit -q -m "commit $i" || exit 1; done`
		if err := w.run(ctx, "sh", "-c", script, repo); err != nil {
			return err
		}
		m := b.add("git fetch, 50ms", "ms", nil)
		return b.turns(b.rounds(9, 3), allWays, func(round int, by way) error {
			into := w.path(fmt.Sprintf("%s.%d.git", confName(by), round))
			if err := w.run(ctx, "git", "init", "-q", "--bare", into); err != nil {
				return err
			}
			cmd := w.command("git", "-C", into, "fetch", "-q", "box:"+repo, "main")
			cmd.Env = append(cmd.Env, "GIT_SSH_COMMAND=ssh -F "+w.path(confName(by)))
			ms, err := w.timed(ctx, cmd)
			m.put(by, ms)
			return err
		})
	})
}

// rsyncSmall copies small files to where none of them is.
func rsyncSmall(ctx context.Context, b *bench) error {
	files := b.rounds(2000, 500)
	return b.inWorld(ctx, setting{link: far(20 * time.Millisecond)}, func(w *world) error {
		if _, err := w.holdAll(ctx, allWays); err != nil {
			return err
		}
		script := `mkdir "$0" && cd "$0" && i=0 && while [ $i -lt $1 ]; do echo "file $i, which is small" >$i || exit 1; i=$((i+1)); done`
		if err := w.run(ctx, "sh", "-c", script, w.path("files"), strconv.Itoa(files)); err != nil {
			return err
		}
		m := b.add(fmt.Sprintf("rsync of %d small files, 20ms", files), "ms", nil)
		return b.turns(b.rounds(7, 3), allWays, func(round int, by way) error {
			into := fmt.Sprintf("box:%s.%d", w.path("copy."+confName(by)), round)
			ms, err := w.timed(ctx, w.command("rsync", "-a", "-e", "ssh -F "+w.path(confName(by)), w.path("files/"), into))
			m.put(by, ms)
			return err
		})
	})
}
