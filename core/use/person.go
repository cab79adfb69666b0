package use

import (
	"context"
	"errors"
)

// ErrNobody says that the client does not ask its person anything, or no more.
var ErrNobody = errors.New("the client can't ask its person")

// Person puts a question, one line, to the person at a client, on the terminal that the client itself asks on, and waits
// for a yes or a no. The error is ErrNobody if there is nobody, or ctx's.
type Person func(ctx context.Context, question string) (yes bool, err error)

type personKey struct{}

// WithPerson returns a context for Gate.Decide in which checks can ask p.
func WithPerson(ctx context.Context, p Person) context.Context {
	return context.WithValue(ctx, personKey{}, p)
}

// PersonAt returns who can be asked; nil: nobody.
func PersonAt(ctx context.Context) Person {
	p, _ := ctx.Value(personKey{}).(Person)
	return p
}
