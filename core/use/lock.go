package use

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/bcrypt"
)

// What locks besides a person.
const (
	LockedByScreen = "screen" // the session's lock, as logind tells it
	LockedBySaver  = "saver"  // a screen saver of the session
	LockedBySleep  = "sleep"  // the machine was about to sleep
)

// lockCost is bcrypt's: a quarter of a second for each guess, here and for whoever has got the state file. Tests lower it.
var lockCost = 12

const (
	// maxPassphrase is what bcrypt takes.
	maxPassphrase = 72
	// wrongPause is the wait after a wrong passphrase for each one before it, up to maxWrong, as in ssh-agent.c.
	wrongPause = 100 * time.Millisecond
	maxWrong   = 100
	// maxLockFile bounds the state file, which holds a few lines.
	maxLockFile = 64 << 10
)

// ErrPassphrase says that a passphrase is wrong, or missing.
var ErrPassphrase = errors.New("that is not the passphrase it was locked with")

// Lock stops new uses: all but those that take something away, until it is opened. A person locks and unlocks, perhaps
// with a passphrase; so do the session's lock, screen savers and sleep, each for itself, and what one of them has locked no
// other opens, but that a person also opens what sleep has locked, and the end of the session's lock all that is not a
// person's.
//
// It is kept in a file, so that the next master begins as this one ended. With a passphrase that file holds its bcrypt
// hash. The lock is no protection from programs of the same user that end the master and remove the file: they end the
// shared connections with it.
//
// All methods may be called by many goroutines, but OnChange.
type Lock struct {
	path string

	now    atomic.Pointer[lockData] // what holds; never nil, and never changed once it is there
	shared atomic.Bool              // the file is another master's

	mu      sync.Mutex // guards changes of now, and the file
	trying  chan struct{}
	wrong   int // passphrases in a row; held with trying
	changed func()
}

// lockData is the state, and what the file holds of it.
type lockData struct {
	Person  *personLock          `json:"person,omitempty"`
	Session map[string]time.Time `json:"session,omitempty"` // since when, by what
}

type personLock struct {
	Since time.Time `json:"since"`
	Hash  string    `json:"hash,omitempty"` // bcrypt; "": without a passphrase
}

func (s *lockData) locked() bool { return s.Person != nil || len(s.Session) > 0 }

// copy is a copy whose parts may be replaced.
func (s *lockData) copy() *lockData {
	c := &lockData{Person: s.Person, Session: map[string]time.Time{}}
	for by, since := range s.Session {
		c.Session[by] = since
	}
	return c
}

// LockState is what holds at one moment.
type LockState struct {
	Locked     bool      `json:"locked"`
	Since      time.Time `json:"since,omitzero"`
	By         []string  `json:"by,omitempty"`         // "person", "screen", "saver", "sleep"; sorted
	Passphrase bool      `json:"passphrase,omitempty"` // a person locked with one
}

// OpenLock reads the state that the file has kept; without a file nothing is locked. A file that can't be understood
// is a lock by a person without a passphrase, and the error says why; the lock is good to use all the same.
func OpenLock(path string) (*Lock, error) {
	l := &Lock{path: path, trying: make(chan struct{}, 1), changed: func() {}}
	state, err := readLock(path)
	if err != nil {
		state = &lockData{Person: &personLock{Since: time.Now()}}
		err = fmt.Errorf("%w; locked until `muxproxy unlock`", err)
	}
	l.now.Store(state)
	return l, err
}

func readLock(path string) (*lockData, error) {
	f, err := openState(path)
	if errors.Is(err, fs.ErrNotExist) {
		return &lockData{}, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() || fi.Size() > maxLockFile {
		return nil, fmt.Errorf("%s is not the file of a lock; remove it", path)
	}
	state := &lockData{}
	dec := json.NewDecoder(f)
	dec.DisallowUnknownFields()
	if err := dec.Decode(state); err != nil {
		return nil, fmt.Errorf("%s can't be read: %w", path, err)
	}
	return state, nil
}

// OnChange has f called after each change, by the goroutine that made it. It is called before the lock is used.
func (l *Lock) OnChange(f func()) { l.changed = f }

// Share leaves the file to another master: this one drains, and people lock that one. From now on what the file says
// locks, besides what LockSession does, which is not written any more; Lock and Unlock are errors.
func (l *Lock) Share() {
	l.mu.Lock()
	defer l.mu.Unlock()
	next := l.now.Load().copy()
	next.Person = nil
	l.shared.Store(true) // first, so that a lock by a person does not open in between
	l.now.Store(next)
}

// holds is what holds at this moment.
func (l *Lock) holds() *lockData {
	if !l.shared.Load() {
		return l.now.Load()
	}
	theirs, err := readLock(l.path)
	if err != nil {
		return &lockData{Person: &personLock{Since: time.Now()}}
	}
	both := theirs.copy()
	for by, since := range l.now.Load().Session {
		both.Session[by] = since
	}
	return both
}

// State tells what holds.
func (l *Lock) State() LockState {
	s := l.holds()
	out := LockState{Locked: s.locked(), Passphrase: s.Person != nil && s.Person.Hash != ""}
	note := func(by string, since time.Time) {
		out.By = append(out.By, by)
		if out.Since.IsZero() || since.Before(out.Since) {
			out.Since = since
		}
	}
	if s.Person != nil {
		note("person", s.Person.Since)
	}
	for by, since := range s.Session {
		note(by, since)
	}
	slices.Sort(out.By)
	return out
}

// Lock locks as a person does. The passphrase may be empty; then Unlock needs none. Who has locked keeps the lock: a
// second one is an error. So is a state file that can't be written, but then it is locked all the same.
func (l *Lock) Lock(passphrase []byte) error {
	if len(passphrase) > maxPassphrase {
		return fmt.Errorf("the passphrase has %d bytes, at most %d are looked at", len(passphrase), maxPassphrase)
	}
	switch { // before the time that a hash takes
	case l.shared.Load():
		return errShared
	case l.now.Load().Person != nil:
		return errLocked
	}
	hash := ""
	if len(passphrase) > 0 {
		b, err := bcrypt.GenerateFromPassword(passphrase, lockCost)
		if err != nil {
			return fmt.Errorf("the passphrase: %w", err)
		}
		hash = string(b)
	}
	return l.change(true, func(s *lockData) error {
		switch {
		case l.shared.Load(): // meanwhile
			return errShared
		case s.Person != nil:
			return errLocked
		}
		s.Person = &personLock{Since: time.Now().Round(0), Hash: hash}
		return nil
	})
}

// errShared is for people who have reached a master that is about to end: what they say here would count for nobody else.
var errShared = errors.New("this master takes no more clients; try again, with the one that the next ssh starts")

var errLocked = errors.New("it is locked already; see `muxproxy status`")

// Unlock opens what a person has locked, and what sleep has. A wrong passphrase is ErrPassphrase, after a wait that
// grows with each; there is one try at a time. What still locks is in State.
func (l *Lock) Unlock(ctx context.Context, passphrase []byte) error {
	select {
	case l.trying <- struct{}{}:
		defer func() { <-l.trying }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	person := l.now.Load().Person
	if person != nil && person.Hash != "" {
		if err := bcrypt.CompareHashAndPassword([]byte(person.Hash), passphrase); err != nil {
			t := time.NewTimer(wrongPause * time.Duration(l.wrong))
			defer t.Stop()
			l.wrong = min(l.wrong+1, maxWrong)
			select {
			case <-t.C:
			case <-ctx.Done():
			}
			return ErrPassphrase
		}
	}
	l.wrong = 0
	return l.change(false, func(s *lockData) error {
		switch {
		case l.shared.Load():
			return errShared
		case s.Person != person:
			return errors.New("it was locked again meanwhile; try again")
		}
		s.Person = nil
		delete(s.Session, LockedBySleep)
		return nil
	})
}

// LockSession locks for one of the constants above. The error is about the state file: it is locked in any case.
func (l *Lock) LockSession(by string) error {
	if _, already := l.now.Load().Session[by]; already {
		return nil
	}
	return l.change(true, func(s *lockData) error {
		s.Session[by] = time.Now().Round(0)
		return nil
	})
}

// UnlockSession opens what has been locked for these. What a person has locked stays so.
func (l *Lock) UnlockSession(by ...string) error {
	held := l.now.Load().Session
	if !slices.ContainsFunc(by, func(b string) bool { _, ok := held[b]; return ok }) {
		return nil
	}
	return l.change(false, func(s *lockData) error {
		for _, b := range by {
			delete(s.Session, b)
		}
		return nil
	})
}

// change replaces the state. One that locks counts before it is written, one that opens when it has been: a file that
// could not be written must not make the next master more open than this one is.
func (l *Lock) change(locks bool, edit func(*lockData) error) error {
	l.mu.Lock()
	next := l.now.Load().copy()
	if err := edit(next); err != nil {
		l.mu.Unlock()
		return err
	}
	if locks {
		l.now.Store(next)
	}
	err := l.save(next)
	switch {
	case err != nil && locks:
		err = fmt.Errorf("locked, but the next master would not know: %w", err)
	case err != nil:
		err = fmt.Errorf("still locked, for the next master would not know: %w", err)
	default:
		l.now.Store(next)
	}
	l.mu.Unlock()
	l.changed()
	return err
}

func (l *Lock) save(s *lockData) error {
	if l.shared.Load() {
		return nil
	}
	if !s.locked() {
		if err := os.Remove(l.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	text, err := json.Marshal(s)
	if err != nil {
		return err
	}
	temp, err := os.CreateTemp(filepath.Dir(l.path), filepath.Base(l.path)+".*") // 0600
	if err != nil {
		return err
	}
	_, err = temp.Write(append(text, '\n'))
	if err = errors.Join(err, temp.Sync(), temp.Close()); err == nil {
		err = os.Rename(temp.Name(), l.path)
	}
	if err != nil {
		os.Remove(temp.Name())
	}
	return err
}

// denied is the lock's word about a use; nil: it may go on.
func (l *Lock) denied(u Use) *Denied {
	if TakesAway(u) {
		return nil
	}
	s := l.holds()
	if !s.locked() {
		return nil
	}
	d := &Denied{By: "lock"}
	var session []string
	for by := range s.Session {
		session = append(session, map[string]string{
			LockedByScreen: "the session is locked", LockedBySaver: "the screen saver is active",
			LockedBySleep: "the machine went to sleep",
		}[by])
	}
	slices.Sort(session)
	switch {
	case s.Person != nil:
		d.Reason, d.Hint = "locked by `muxproxy lock`", "run `muxproxy unlock`"
	default:
		d.Reason, d.Hint = strings.Join(session, ", "), "unlock the session"
		if _, ok := s.Session[LockedBySleep]; ok && len(session) == 1 {
			d.Hint = "unlock the session, or run `muxproxy unlock`"
		}
	}
	return d
}

// TakesAway reports whether a use only ends something, or opens the lock, which asks for itself, or has another master take
// over, lock and all: such uses are never stopped by the lock, or by a log that can't be written.
func TakesAway(u Use) bool {
	return u.Kind == CancelForward || u.Kind == Control && slices.Contains(takeAway, u.Name)
}

var takeAway = []string{"lock", "unlock", "close", "drain", "stop", "stop --drain", "restart", "forward remove", "confirm forget"}
