//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"time"
)

// standing is a stream through a local and through a dynamic forward of the plugin, beside those of an ssh -L and an
// ssh -D, to the same place on the same server.
func standing(ctx context.Context, b *bench) error {
	return b.inWorld(ctx, setting{}, func(w *world) error {
		l, err := source()
		if err != nil {
			return err
		}
		defer l.Close()
		to := l.Addr().String()
		if _, err := w.hold(ctx, pipes); err != nil { // it starts the master
			return err
		}
		listen := map[string]string{}
		for _, kind := range []string{"local", "dynamic"} {
			free, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				return err
			}
			listen[kind] = free.Addr().String()
			free.Close()
		}
		err = w.writePolicy(ctx, fmt.Sprintf("master {\n  ssh_config = %q\n}\nhost \"box\" {\n  forward {\n    local %q { to = %q }\n    dynamic %q {}\n  }\n}\n",
			w.path(confName(pipes)), listen["local"], to, listen["dynamic"]))
		if err != nil {
			return err
		}
		plugin, err := w.pluginPID(ctx, "forward")
		if err != nil {
			return err
		}
		size := int64(b.rounds(512, 128)) << 20
		work := b.add("processor time of the plugin forward", "s/GiB", atMost(0.05))
		for _, c := range []struct {
			kind, option, to string
		}{{"local", "-L", ":" + to}, {"dynamic", "-D", ""}} {
			address, stop, err := w.forward(ctx, c.option, c.to)
			if err != nil {
				return err
			}
			defer stop()
			for _, d := range []string{"down", "up"} {
				speed := b.add(fmt.Sprintf("a %s forward %s, against ssh %s", c.kind, d, c.option), "MiB/s", nil)
				err := b.turns(b.rounds(7, 2), []way{plain, pipes}, func(_ int, by way) error {
					at := address
					if by == pipes {
						at = listen[c.kind]
					}
					before, err := readStat(plugin)
					if err != nil {
						return err
					}
					took, err := through(at, c.kind, to, d, size)
					if err != nil {
						return fmt.Errorf("%s, %s: %w", c.kind, by, err)
					}
					speed.put(by, float64(size)/(1<<20)/took.Seconds())
					if by == pipes {
						after, err := readStat(plugin)
						if err != nil {
							return err
						}
						work.put(by, (after.own-before.own).Seconds()*float64(1<<30)/float64(size))
					}
					return nil
				})
				if err != nil {
					return err
				}
				speed.Goal = &goal{Op: ">=", Bound: 0.9, Of: "ssh " + c.option, Base: map[way][]float64{pipes: speed.Values[plain]}}
			}
		}
		return nil
	})
}

// through moves bytes through a forward that listens somewhere, when it does.
func through(at, kind, to, direction string, size int64) (time.Duration, error) {
	conn, err := net.Dial("tcp", at)
	for end := time.Now().Add(patience); err != nil && time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		conn, err = net.Dial("tcp", at)
	}
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	c := conn.(*net.TCPConn)
	if kind == "dynamic" { // SOCKS 5, RFC 1928
		target, err := net.ResolveTCPAddr("tcp", to)
		if err != nil {
			return 0, err
		}
		ask := append([]byte{5, 1, 0, 5, 1, 0, 1}, target.IP.To4()...)
		if _, err := c.Write(append(ask, byte(target.Port>>8), byte(target.Port))); err != nil {
			return 0, err
		}
		answer := make([]byte, 12) // the method, and the reply with an IPv4 address
		if _, err := io.ReadFull(c, answer); err != nil {
			return 0, err
		}
		if answer[3] != 0 {
			return 0, fmt.Errorf("SOCKS reply %d", answer[3])
		}
	}
	return transfer(c, direction, size)
}

// pluginPID is the process of a plugin that runs.
func (w *world) pluginPID(ctx context.Context, name string) (int, error) {
	out, err := w.command(filepath.Join(w.b.bin, "muxproxy"), "plugin", "list", "--json").Output()
	if err != nil {
		return 0, fmt.Errorf("muxproxy plugin list: %w", err)
	}
	var list []struct {
		Name string `json:"name"`
		PID  int    `json:"pid"`
	}
	if err := json.Unmarshal(out, &list); err != nil {
		return 0, err
	}
	for _, p := range list {
		if p.Name == name && p.PID != 0 {
			return p.PID, ctx.Err()
		}
	}
	return 0, errors.New("the plugin " + name + " does not run")
}
