// Package sshconfig says what ssh_config means for one destination: `ssh -G`, the options of ssh's own command line, parsing.
package sshconfig

import (
	"slices"
	"time"
)

// Resolved is what `ssh -G` said for one destination. The zero value is an empty answer.
type Resolved struct {
	// Options maps a lower-case keyword to its values in the order printed. `~` and tokens are already expanded in
	// those that ssh -G leaves alone (IdentityFile, CertificateFile, UserKnownHostsFile, GlobalKnownHostsFile, ...).
	Options map[string][]string `json:"options"`
	// Files are those whose change makes this answer stale, absent ones too.
	Files []Stamp `json:"files,omitempty"`
	// Set names the keywords (lower case, sorted) that some file or option sets for some host. One that is not in it has
	// ssh's own default.
	Set []string `json:"set,omitempty"`
	// Volatile: the answer depends on more than files (Match exec); never cache it.
	Volatile bool `json:"volatile,omitempty"`
}

// Stamp is what a file looked like when it was read. A zero ModTime means that it did not exist.
type Stamp struct {
	Path    string    `json:"path"`
	ModTime time.Time `json:"mtime"`
	Size    int64     `json:"size"`
	Inode   uint64    `json:"inode"`
}

// Get returns the first value of a keyword (lower case), or "".
func (r *Resolved) Get(keyword string) string {
	if v := r.Options[keyword]; len(v) > 0 {
		return v[0]
	}
	return ""
}

// All returns all values of a keyword (lower case).
func (r *Resolved) All(keyword string) []string { return r.Options[keyword] }

// IsSet reports whether any file or option sets a keyword (lower case). If not, its value is ssh's default.
func (r *Resolved) IsSet(keyword string) bool { return slices.Contains(r.Set, keyword) }
