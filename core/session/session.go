// Package session follows the user's desktop session: what locks its screen, and sleep, lock muxproxy too.
package session

import (
	"github.com/rs/zerolog"
)

// Options say what to follow, and where.
type Options struct {
	Screen bool // the session's lock (logind), and screen savers
	Sleep  bool // the machine goes to sleep
	// Getenv gives DBUS_SYSTEM_BUS_ADDRESS and DBUS_SESSION_BUS_ADDRESS. Without the first the system's own bus is meant,
	// without the second the one in /run/user/UID.
	Getenv func(string) string
	Log    zerolog.Logger
}

// Locker is what is locked and opened: *use.Lock. by is one of package use's constants.
type Locker interface {
	LockSession(by string) error
	UnlockSession(by ...string) error
}

// Waker is what a Locker may be besides. Waking up opens no lock.
type Waker interface {
	Awake() // is called when the machine has slept, or was about to
}
