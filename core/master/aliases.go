package master

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/muxproxy/muxproxy/core/sshconfig"
	"github.com/muxproxy/muxproxy/core/use"
)

const (
	// aliasTime bounds one `ssh -G`.
	aliasTime = 10 * time.Second
	// volatileTime is how long an answer counts that depends on more than files (Match exec).
	volatileTime = 30 * time.Second
)

// aliases finds out where the names lead that clients were started with, by our own `ssh -G`, without any option of the
// client: those it could choose. One that can't be checked does not count, which gives a client nothing that it could not
// have by leaving the alias out.
type aliases struct {
	config string // what ssh -F is given; "": ssh's own files. Set before the first use
	say    func(error)

	mu    sync.Mutex // guards known
	known map[use.Target]*lead
}

// lead is one answer, or the wait for it.
type lead struct {
	done chan struct{} // closed when the rest is set
	r    *sshconfig.Resolved
	at   time.Time
}

func (l *lead) fresh() bool {
	switch {
	case l.r == nil:
		return time.Since(l.at) < volatileTime // not again for each use
	case l.r.Volatile:
		return time.Since(l.at) < volatileTime
	}
	return l.r.Fresh()
}

// leads is policy.Options' Alias.
func (a *aliases) leads(t use.Target) bool {
	if strings.HasPrefix(t.Alias, "-") || t.Alias == "" {
		return false
	}
	// As a destination, anything@host and ssh://anything@host lead to host. ssh's %n has neither: it is a caller that wants
	// to match some block, or get out of one by its "!".
	if strings.ContainsAny(t.Alias, "@/") {
		return false
	}
	key := use.Target{User: t.User, Port: t.Port, Alias: t.Alias}
	for {
		a.mu.Lock()
		l := a.known[key]
		if l == nil {
			l = &lead{done: make(chan struct{})}
			a.putLocked(key, l)
			a.mu.Unlock()
			l.r, l.at = a.ask(key), time.Now()
			close(l.done)
			return l.to(t)
		}
		a.mu.Unlock()
		<-l.done
		if l.fresh() {
			return l.to(t)
		}
		a.mu.Lock()
		if a.known[key] == l {
			delete(a.known, key)
		}
		a.mu.Unlock()
	}
}

func (a *aliases) putLocked(key use.Target, l *lead) {
	if a.known == nil {
		a.known = map[use.Target]*lead{}
	}
	makeRoom(a.known)
	a.known[key] = l
}

func (a *aliases) ask(key use.Target) *sshconfig.Resolved {
	ctx, cancel := context.WithTimeout(context.Background(), aliasTime)
	defer cancel()
	r, err := askSSH(ctx, a.config, key)
	if err != nil {
		a.say(fmt.Errorf("%q: %w", key.Alias, err))
		return nil
	}
	return r
}

func (l *lead) to(t use.Target) bool {
	if l.r == nil {
		return false
	}
	bare := func(host string) string { return strings.TrimSuffix(strings.Trim(host, "[]"), ".") }
	return strings.EqualFold(bare(l.r.Get("hostname")), bare(t.Host))
}
