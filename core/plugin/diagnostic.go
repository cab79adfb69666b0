package plugin

import "fmt"

// Diagnostic is a problem of one place in the configuration. Block.Errorf and Block.Warnf make them.
type Diagnostic struct {
	Warning bool
	Summary string // one line, lower case, no full stop
	Block   string // id of the block
	Path    Path
}

// Diagnostics are all problems found.
type Diagnostics []Diagnostic

// HasErrors reports whether there is one that is not only a warning.
func (ds Diagnostics) HasErrors() bool {
	for _, d := range ds {
		if !d.Warning {
			return true
		}
	}
	return false
}

// Path leads from a block into it: a string is the name of an attribute or a nested block, an int the index in a list or
// of a nested block of that name, a Key one in a map.
type Path []any

// Key is a step into a map.
type Key string

// Errorf makes an error of the value at path, which may be nil: it concerns the block.
func (b Block) Errorf(path Path, format string, args ...any) Diagnostic {
	return Diagnostic{Block: b.id, Path: path, Summary: fmt.Sprintf(format, args...)}
}

// Warnf is Errorf for something that does not keep the configuration from being used.
func (b Block) Warnf(path Path, format string, args ...any) Diagnostic {
	d := b.Errorf(path, format, args...)
	d.Warning = true
	return d
}
