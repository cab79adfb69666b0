package upstream

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"

	"github.com/muxproxy/muxproxy/core/pool"
)

// updated waits until the server's list of host keys has been dealt with.
func updated(t *testing.T, c pool.Conn) {
	t.Helper()
	select {
	case <-c.(*conn).updated:
	case <-time.After(20 * time.Second):
		t.Fatal("nothing came of the server's list")
	}
}

func TestUpdateHostKeys(t *testing.T) {
	user := newKey(t, "ed25519")
	ed, r, ec, gone := newKey(t, "ed25519"), newKey(t, "rsa"), newKey(t, "ecdsa"), newKey(t, "ecdsa521")
	dir := t.TempDir()
	s := startSSHD(t, ed, []key{user}, "HostKey "+r.file(t, dir, "rsa", ""), "HostKey "+ec.file(t, dir, "ec", ""))
	id := "identityfile " + user.file(t, dir, "id", "")
	name := fmt.Sprintf("[127.0.0.1]:%d", s.port)
	line := func(hosts string, k key) string { return hosts + " " + k.line() }
	rest := "# mine\nother.example.com ssh-ed25519 broken\n" + line("third", newKey(t, "ed25519"))
	all := line(name, ed) + line(name, r) + line(name, ec)
	for _, tc := range []struct {
		name    string
		before  string
		second  string // a second file, "" for none
		options []string
		answers []string
		want    string // "" for as before; HASHED stands for a hashed name
	}{
		{name: "learns", before: rest + line(name, ed), want: rest + all},
		{name: "learns, no newline at the end", before: strings.TrimSpace(rest + line(name, ed)), want: rest + all},
		{name: "retires", before: line(name, gone) + all + rest, want: all + rest},
		{name: "both", before: line(name, gone) + line(name, ec) + rest, want: line(name, ec) + rest + line(name, r) + line(name, ed)},
		{name: "nothing to do", before: all},
		{name: "hashed", before: line(knownhosts.HashHostname(name), ed), options: []string{"hashknownhosts yes"},
			want: "HASHED " + ed.line() + "HASHED " + r.line() + "HASHED " + ec.line()},
		{name: "with an address", before: line(name+",192.0.2.1", ed), want: line(name+",192.0.2.1", ed) + line(name, r) + line(name, ec)},
		{name: "HostKeyAlias", before: line("alias", ed), options: []string{"hostkeyalias alias"}, want: line("alias", ed) + line("alias", r) + line("alias", ec)},
		{name: "HostKeyAlgorithms", before: line(name, ed), options: []string{"hostkeyalgorithms ssh-ed25519,rsa-sha2-512"}, want: line(name, ed) + line(name, r)},
		{name: "accepted by a person", before: rest, answers: []string{"yes"}, want: rest + all},
		{name: "two files", before: rest, second: "# second\n" + line(name, ed) + line(name, gone), want: rest + line(name, r) + line(name, ec) + line(name, ed)},

		{name: "no", before: line(name, ed), options: []string{"updatehostkeys false"}},
		{name: "ask", before: line(name, ed), options: []string{"updatehostkeys ask"}},
		{name: "pattern", before: line("[127.*]:*", ed)},
		{name: "three names", before: line(name+",a,b", ed)},
		{name: "another name", before: line(name, ed) + line("elsewhere", ed)},
		{name: "new key under another name", before: line(name, ed) + line("elsewhere", r)},
		{name: "retired key under another name", before: all + line(name, gone) + line("elsewhere", gone)},
		{name: "marker", before: line(name, ed) + line("@cert-authority "+name, gone)},
		{name: "known without port", before: line("127.0.0.1", ed)},
		{name: "accepted unasked", before: "", options: []string{"stricthostkeychecking accept-new"}, want: line(name, ed)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			file := write(t, dir, "known", tc.before)
			check(t, os.Chmod(file, 0o640))
			options := append(tc.options, id, "updatehostkeys true", "userknownhostsfile "+file)
			if tc.second != "" {
				options = append(options, "userknownhostsfile "+write(t, dir, "second", tc.second))
			}
			// What lets ssh ask for the key that it knows is not what is tested here.
			if !strings.Contains(strings.Join(options, " "), "hostkeyalgorithms") {
				options = append(options, "hostkeyalgorithms ssh-ed25519,rsa-sha2-512,ecdsa-sha2-nistp256")
			}
			c, fails := dialAsking(t, spec(t, s.port, options...), answering(tc.answers...))
			if c == nil {
				t.Fatal(fails)
			}
			updated(t, c)
			text, err := os.ReadFile(file)
			check(t, err)
			want := tc.want
			if want == "" {
				want = tc.before
			}
			if tc.second != "" { // ssh moves what is right to the first file
				if text, err := os.ReadFile(filepath.Join(dir, "second")); err != nil || string(text) != "# second\n" {
					t.Errorf("the second file has %q, %v", text, err)
				}
			}
			if strings.Contains(want, "HASHED") {
				for line := range strings.Lines(string(text)) {
					hashed, _, _ := strings.Cut(line, " ")
					if !matchHosts(hashed, name) || !strings.HasPrefix(hashed, "|1|") {
						t.Errorf("got %q", line)
					}
					text = []byte(strings.Replace(string(text), hashed, "HASHED", 1))
				}
			}
			if string(text) != want {
				t.Errorf("got  %s\nwant %s", text, want)
			}
			info, err := os.Stat(file)
			check(t, err)
			if info.Mode().Perm() != 0o640 {
				t.Errorf("mode %v", info.Mode())
			}
			old, err := os.ReadFile(file + ".old")
			if rewritten := err == nil; rewritten != (tc.want != "" && tc.name != "accepted unasked") {
				t.Errorf("a copy of the file before: %v", err)
			} else if rewritten && tc.answers == nil && string(old) != tc.before {
				t.Errorf("the copy has %q", old)
			}
			if left, _ := filepath.Glob(file + ".*"); len(left) > 1 {
				t.Errorf("left %q", left)
			}
			check(t, c.(pool.HostKeyKeeper).HostKeyStillGood(spec(t, s.port, options...)))
		})
	}
}

// A link is followed, not replaced, and a file that can't be written stays.
func TestReplaceHost(t *testing.T) {
	k, other := newKey(t, "ed25519"), newKey(t, "ed25519")
	dir := t.TempDir()
	file := write(t, dir, "file", "h "+k.line())
	link := filepath.Join(dir, "link")
	check(t, os.Symlink("file", link))
	changed, err := replaceHost(link, "h", []ssh.PublicKey{other.pub}, false)
	if !changed || err != nil {
		t.Fatalf("got %v, %v", changed, err)
	}
	if to, err := os.Readlink(link); to != "file" || err != nil {
		t.Errorf("the link is %q, %v", to, err)
	}
	text, err := os.ReadFile(file)
	check(t, err)
	if string(text) != "h "+other.line() {
		t.Errorf("got %q", text)
	}
	if changed, err = replaceHost(file, "h", []ssh.PublicKey{other.pub}, false); changed || err != nil {
		t.Errorf("got %v, %v", changed, err)
	}
	for _, bad := range []string{filepath.Join(dir, "absent"), dir, "/dev/null"} {
		if changed, err := replaceHost(bad, "h", []ssh.PublicKey{k.pub}, false); changed || err == nil {
			t.Errorf("%s: %v, %v", bad, changed, err)
		}
	}
}

// What a server says wrongly changes nothing, and never reaches the pool.
func TestUpdateHostKeysLies(t *testing.T) {
	host, extra := newKey(t, "ed25519"), newKey(t, "ecdsa")
	f := startFake(t, openServer(), host.signer)
	blob := func(k key) []byte { return ssh.Marshal(struct{ B []byte }{k.pub.Marshal()}) }
	both := append(blob(host), blob(extra)...)
	sign := func(by key, data []byte) []byte {
		sig, err := by.signer.Sign(nil, data)
		check(t, err)
		return ssh.Marshal(struct{ B []byte }{ssh.Marshal(sig)})
	}
	proof := func(s *fakeConn, purpose string) []byte {
		return ssh.Marshal(struct {
			Purpose    string
			Session, B []byte
		}{purpose, s.SessionID(), extra.pub.Marshal()})
	}
	const purpose = "hostkeys-prove-00@openssh.com"
	for _, tc := range []struct {
		name   string
		list   []byte
		prove  func(*fakeConn) (bool, []byte) // nil: must not be asked
		learnt bool
	}{
		{"true", both, func(s *fakeConn) (bool, []byte) { return true, sign(extra, proof(s, purpose)) }, true},
		{"signed by another", both, func(s *fakeConn) (bool, []byte) { return true, sign(host, proof(s, purpose)) }, false},
		{"signed for another purpose", both, func(s *fakeConn) (bool, []byte) { return true, sign(extra, proof(s, "x")) }, false},
		{"nothing signed", both, func(*fakeConn) (bool, []byte) { return true, nil }, false},
		{"more than asked", both, func(s *fakeConn) (bool, []byte) {
			return true, append(sign(extra, proof(s, purpose)), sign(extra, proof(s, purpose))...)
		}, false},
		{"garbage", both, func(*fakeConn) (bool, []byte) { return true, []byte("garbage") }, false},
		{"refuses", both, func(*fakeConn) (bool, []byte) { return false, nil }, false},
		{"malformed list", append(both, 1, 2), nil, false},
		{"a key twice", append(both, blob(extra)...), nil, false},
		{"unknown types", ssh.Marshal(struct{ B []byte }{[]byte("\x00\x00\x00\x06future")}), nil, false},
		{"empty", nil, nil, false},
		{"not ours", blob(extra), nil, false},
		{"too many", func() (list []byte) {
			for range maxServerKeys + 1 {
				list = append(list, blob(newKey(t, "ed25519"))...)
			}
			return list
		}(), nil, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			known := fmt.Sprintf("[127.0.0.1]:%d %s", f.port, host.line())
			file := write(t, t.TempDir(), "known", known)
			c, err := (&Dialer{}).Dial(t.Context(), spec(t, f.port, "userknownhostsfile "+file, "updatehostkeys yes"), nil)
			check(t, err)
			s := <-f.conns
			_, _, err = s.SendRequest("hostkeys-00@openssh.com", false, tc.list)
			check(t, err)
			_, _, err = s.SendRequest("hostkeys-00@openssh.com", false, both) // once is all that counts
			check(t, err)
			_, _, err = s.SendRequest("mine", false, []byte("x"))
			check(t, err)
			if r := <-c.Requests(); r.Type != "mine" || string(r.Payload) != "x" {
				t.Errorf("got %q", r.Type)
			}
			serve(t, c)
			if tc.prove != nil {
				r := <-s.requests
				if r.Type != purpose || string(r.Payload) != string(blob(extra)) {
					t.Errorf("got %q", r.Type)
				}
				ok, reply := tc.prove(s)
				r.Reply(ok, reply)
			}
			updated(t, c)
			select {
			case r := <-s.requests:
				t.Errorf("the server was asked %q", r.Type)
			default:
			}
			text, err := os.ReadFile(file)
			check(t, err)
			if want := known + map[bool]string{true: fmt.Sprintf("[127.0.0.1]:%d %s", f.port, extra.line())}[tc.learnt]; string(text) != want {
				t.Errorf("got %q", text)
			}
		})
	}
}

// A server that never proves anything delays neither the connection nor its end.
func TestUpdateHostKeysNeverProved(t *testing.T) {
	host, extra := newKey(t, "ed25519"), newKey(t, "ecdsa")
	f := startFake(t, openServer(), host.signer)
	file := write(t, t.TempDir(), "known", fmt.Sprintf("[127.0.0.1]:%d %s", f.port, host.line()))
	c := dial(t, spec(t, f.port, "userknownhostsfile "+file, "updatehostkeys yes"))
	s := <-f.conns
	_, _, err := s.SendRequest("hostkeys-00@openssh.com", true, append(ssh.Marshal(struct{ B []byte }{host.pub.Marshal()}),
		ssh.Marshal(struct{ B []byte }{extra.pub.Marshal()})...))
	check(t, err)
	<-s.requests // the proof is asked for
	ch, requests, err := c.OpenChannel("session", nil)
	check(t, err)
	go ssh.DiscardRequests(requests)
	(<-s.channels).Close()
	ch.Close()
	c.Close()
	check(t, c.Wait())
}

func FuzzServerKeys(f *testing.F) {
	k := newKey(f, "ed25519")
	f.Add(ssh.Marshal(struct{ B []byte }{k.pub.Marshal()}))
	f.Add([]byte("\x00\x00\x00\x06future"))
	f.Fuzz(func(t *testing.T, payload []byte) {
		u := &updater{allowed: preferredHostKeys}
		keys, why := u.parse(payload)
		if (why == "") != (len(keys) > 0) || len(keys) > maxServerKeys {
			t.Errorf("%d keys, %q", len(keys), why)
		}
	})
}
