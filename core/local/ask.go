package local

import (
	"context"
	"errors"

	"golang.org/x/crypto/ssh"
)

// Question is put to the person at a client's ssh (RFC 4256 section 3.2).
type Question struct {
	Name, Instruction string
	Prompts           []string
	Echos             []bool // one for each prompt
}

// ErrUnanswered says that a client left, or can't put questions to a person.
var ErrUnanswered = errors.New("the client did not answer")

// asked is a question on its way to the client and back.
type asked struct {
	Question
	answers chan []string // one value, or closed without: unanswered
}

func (a *asked) answer(answers []string) { a.answers <- answers }
func (a *asked) fail()                   { close(a.answers) }

// password tells whether an answer to a password attempt can stand for the question's.
func (a *asked) password() bool { return len(a.Prompts) == 1 && !a.Echos[0] }

// Ask puts a question to the client's person and waits for the answers. The client asks to be let in first, so this may
// wait for its key exchange. One question at a time: a second one waits for the first. The error is ErrUnanswered if
// the client has left, has been let in, or does not ask its person anything.
func (h *Handshake) Ask(ctx context.Context, q Question) ([]string, error) {
	a := &asked{Question: q, answers: make(chan []string, 1)}
	select {
	case h.questions <- a:
	case <-h.ended:
		return nil, ErrUnanswered
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	select {
	case answers, ok := <-a.answers:
		if !ok || len(answers) != len(q.Prompts) {
			return nil, ErrUnanswered
		}
		return answers, nil
	case <-h.ended:
		return nil, ErrUnanswered
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// admission is one client's way through the authentication. Its methods are called by x/crypto's one goroutine for it.
type admission struct {
	h      *Handshake
	user   string
	begin  func()        // starts the login, once
	done   chan struct{} // closed when the login is over and err is set
	err    error
	refuse func(error) // ends the client

	pending *asked // came while a method was tried that can't put it to the person
}

// wait returns the login's result, or the question that stands before it.
func (a *admission) wait() (*asked, error) {
	a.begin()
	if q := a.pending; q != nil {
		a.pending = nil
		return q, nil
	}
	select {
	case <-a.done:
	default:
		select {
		case <-a.done:
		case q := <-a.h.questions:
			return q, nil
		}
	}
	return nil, a.err
}

// errAsk makes a client go on to a method that can put a question to the person.
var errAsk = errors.New("a person has to answer")

// none answers RFC 4252 section 5.2. With a question open, only methods that can ask are offered: ssh would else try
// all its keys first.
func (a *admission) none(c ssh.ConnMetadata) (*ssh.Permissions, error) {
	if err := a.check(c); err != nil {
		return nil, err
	}
	q, err := a.wait()
	if q == nil {
		return nil, err
	}
	a.pending = q
	return nil, &ssh.PartialSuccessError{Next: ssh.ServerAuthCallbacks{
		KeyboardInteractiveCallback: a.keyboardInteractive,
		PasswordCallback:            a.password,
	}}
}

// publicKey takes any key (paramiko never tries none), but no key is an answer.
func (a *admission) publicKey(c ssh.ConnMetadata, _ ssh.PublicKey) (*ssh.Permissions, error) {
	if err := a.check(c); err != nil {
		return nil, err
	}
	q, err := a.wait()
	if q == nil {
		return nil, err
	}
	a.pending = q
	return nil, errAsk
}

// keyboardInteractive puts one question after another until the login is over.
func (a *admission) keyboardInteractive(c ssh.ConnMetadata, challenge ssh.KeyboardInteractiveChallenge) (*ssh.Permissions, error) {
	if err := a.check(c); err != nil {
		return nil, err
	}
	for {
		q, err := a.wait()
		if q == nil {
			return nil, err
		}
		answers, err := challenge(q.Name, q.Instruction, q.Prompts, q.Echos)
		if err != nil {
			q.fail()
			return nil, err
		}
		q.answer(answers)
	}
}

// password is for clients that can do nothing else: it answers the first question that is for one secret.
func (a *admission) password(c ssh.ConnMetadata, password []byte) (*ssh.Permissions, error) {
	if err := a.check(c); err != nil {
		return nil, err
	}
	used := false
	for {
		q, err := a.wait()
		switch {
		case q == nil:
			return nil, err
		case used || !q.password():
			a.pending = q
			return nil, errAsk
		}
		used = true
		q.answer([]string{string(password)})
	}
}

func (a *admission) check(c ssh.ConnMetadata) error {
	if c.User() == a.user {
		return nil
	}
	err := errors.New("the client's user is not the target's")
	a.refuse(err)
	return err
}
