package pluginrun

import (
	"errors"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/muxproxy/muxproxy/core/plugin"
)

// CallError says in a person's words why a call to a plugin failed. Problems of a configuration never come this way: any
// error is the plugin's fault, or its death. That the caller gave up is for the caller to see.
func CallError(err error) error {
	st := status.Convert(err)
	switch st.Code() {
	case codes.OK:
		return nil
	case codes.DeadlineExceeded:
		return errors.New("it does not answer in time")
	case codes.Unavailable, codes.Canceled: // the connection was lost, or closed for that
		return errors.New("it has ended")
	case codes.Unimplemented:
		return errors.New("it does not know this call")
	case codes.Unauthenticated:
		return errors.New("it refuses its own token")
	}
	return fmt.Errorf("it fails: %s", clip(plugin.Printable(st.Message()), 200))
}
