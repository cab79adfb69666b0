//go:build !linux

package session

import "context"

// Watch says in the log that there is nothing to follow on this system, and returns when ctx ends.
func Watch(ctx context.Context, o Options, _ Locker) {
	if o.Screen || o.Sleep {
		o.Log.Warn().Msg("lock_on in the policy does nothing here: it needs systemd-logind")
	}
	<-ctx.Done()
}
