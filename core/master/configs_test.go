package master

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/muxproxy/muxproxy/core/sshconfig"
	"github.com/muxproxy/muxproxy/core/wire"
)

// stamped is an answer that was read from a file.
func stamped(t *testing.T, file string) sshconfig.Resolved {
	t.Helper()
	info, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	_, inode, _ := deviceInode(info)
	return sshconfig.Resolved{
		Options: map[string][]string{"hostname": {"web"}},
		Files:   []sshconfig.Stamp{{Path: file, ModTime: info.ModTime(), Size: info.Size(), Inode: inode}},
	}
}

// An answer is kept for who asks the same, as long as no file has changed that it or a jump host's was read from.
func TestAnAnswerIsKeptUntilAFileChanges(t *testing.T) {
	file := filepath.Join(t.TempDir(), "config")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	hello := func() wire.Hello {
		return wire.Hello{Target: wire.Target{User: "me", Host: "web", Port: 22, Alias: "w"}, SSHArgs: []string{"-4"}, Env: map[string]string{"HOME": "/h"}}
	}
	for name, answer := range map[string]func() resolution{
		"host":      func() resolution { return resolution{config: stamped(t, file)} },
		"jump host": func() resolution { return resolution{hops: []wire.Hop{{Config: stamped(t, file)}}} },
	} {
		write("one")
		var c configs
		if _, ok := c.get(hello(), nil); ok {
			t.Errorf("%s: known beforehand", name)
		}
		c.put(hello(), nil, answer())
		if _, ok := c.get(hello(), nil); !ok {
			t.Errorf("%s: forgotten", name)
		}
		for what, other := range map[string]func(h *wire.Hello){
			"user": func(h *wire.Hello) { h.Target.User = "you" }, "alias": func(h *wire.Hello) { h.Target.Alias = "web" },
			"port": func(h *wire.Hello) { h.Target.Port = 23 }, "arguments": func(h *wire.Hello) { h.SSHArgs = []string{"-6"} },
			"environment": func(h *wire.Hello) { h.Env["SSH_AUTH_SOCK"] = "/agent" },
		} {
			h := hello()
			other(&h)
			if _, ok := c.get(h, nil); ok {
				t.Errorf("%s: known for another %s", name, what)
			}
		}
		for _, via := range [][]string{{}, {"bastion"}} {
			if _, ok := c.get(hello(), via); ok {
				t.Errorf("%s: known for the jump hosts %q", name, via)
			}
		}
		write("another")
		if _, ok := c.get(hello(), nil); ok {
			t.Errorf("%s: kept although the file has changed", name)
		}
		c.put(hello(), nil, answer())
		if _, ok := c.get(hello(), nil); !ok {
			t.Errorf("%s: the new answer is not kept", name)
		}
	}
	for name, r := range map[string]resolution{
		"host": {config: sshconfig.Resolved{Volatile: true}}, "jump host": {hops: []wire.Hop{{Config: sshconfig.Resolved{Volatile: true}}}},
	} {
		var c configs
		if c.put(hello(), nil, r); len(c.byKey) != 0 {
			t.Errorf("%s: an answer that depends on more than files is kept", name)
		}
	}
	var c configs
	for n := range 2 * maxConfigs {
		h := hello()
		h.Target.Host = fmt.Sprint("host", n)
		c.put(h, nil, resolution{})
		if _, ok := c.get(h, nil); !ok || len(c.byKey) > maxConfigs {
			t.Fatalf("after %d: kept %t, %d in all", n+1, ok, len(c.byKey))
		}
	}
}
