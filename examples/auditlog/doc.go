// Package auditlog holds a plugin in Python and its test; there is no Go in it.
package auditlog
