//go:build !linux

package doctor

import (
	"context"
	"errors"
)

// login is what logind says of this user.
type login struct{ kills, lingers bool }

func askLogind(context.Context, func(string) string) (login, error) {
	return login{}, errors.ErrUnsupported
}
