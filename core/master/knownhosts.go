package master

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/muxproxy/muxproxy/core/local"
	"github.com/muxproxy/muxproxy/core/paths"
)

// knownHosts is the known_hosts file that ssh_config names: one @cert-authority line per CA of each living master.
// Its folder may be shared by several hosts, so a line's comment says host and pid.
type knownHosts struct {
	path string // its lock is beside it
	host string
	pid  int
}

const knownHostsLockTime = 5 * time.Second

// add puts the lines of CAs there that it lacks, and takes the lines of this host's dead masters out.
func (k knownHosts) add(cas ...string) error {
	return k.rewrite(func(lines []string) []string {
		for _, ca := range cas {
			if line := local.KnownHostsLine(ca, k.mark()); !slices.Contains(lines, line) {
				lines = append(lines, line)
			}
		}
		return lines
	})
}

// remove takes this master's lines out.
func (k knownHosts) remove() error {
	return k.rewrite(func(lines []string) []string {
		var kept []string
		for _, l := range lines {
			if !strings.HasSuffix(l, " "+k.mark()) {
				kept = append(kept, l)
			}
		}
		return kept
	})
}

func (k knownHosts) mark() string { return k.host + "+" + strconv.Itoa(k.pid) }

func (k knownHosts) rewrite(change func([]string) []string) error {
	ctx, cancel := context.WithTimeout(context.Background(), knownHostsLockTime)
	defer cancel()
	lock, err := paths.Lock(ctx, k.path+".lock")
	if err != nil {
		return err
	}
	defer lock.Close()
	data, err := os.ReadFile(k.path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	var lines []string
	for l := range strings.Lines(string(data)) {
		if l = strings.TrimRight(l, "\r\n"); l != "" && !k.dead(l) {
			lines = append(lines, l)
		}
	}
	text := strings.Join(change(lines), "\n")
	if text != "" {
		text += "\n"
	}
	return replace(k.path, []byte(text))
}

// dead tells whether a line is of a master of this host that has ended. A pid that has been taken again keeps a line
// for longer than needed: nobody has the key to it.
func (k knownHosts) dead(line string) bool {
	host, pid, ok := strings.Cut(line[strings.LastIndexByte(line, ' ')+1:], "+")
	n, err := strconv.Atoi(pid)
	return ok && err == nil && host == k.host && n != k.pid && !paths.Alive(n)
}

// replace writes a file anew in one step; on an error the old one stays.
func replace(path string, data []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // gone after the rename
	_, err = f.Write(data)
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return os.Rename(f.Name(), path)
}
