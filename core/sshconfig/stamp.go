package sshconfig

import "os"

func newStamp(path string) Stamp {
	s := Stamp{Path: path}
	if info, err := os.Stat(path); err == nil {
		s.ModTime, s.Size, s.Inode = info.ModTime(), info.Size(), inode(info)
	}
	return s
}

// Fresh reports whether every file is still as it was. It says nothing of a Volatile answer, which is never fresh.
func (r *Resolved) Fresh() bool {
	if r.Volatile {
		return false
	}
	for _, old := range r.Files {
		now := newStamp(old.Path)
		if !now.ModTime.Equal(old.ModTime) || now.Size != old.Size || now.Inode != old.Inode {
			return false
		}
	}
	return true
}
