package plugin

import (
	"bufio"
	"context"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	stdlog "log"
	"os"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	goplugin "github.com/hashicorp/go-plugin"
	"github.com/rs/zerolog"
	"google.golang.org/grpc"
)

const (
	helloTime = 10 * time.Second // for the first line of standard input
	maxHello  = 64 << 10
	closeTime = time.Second // for a plugin's Close
)

// Serve runs a plugin until the master ends it or is gone. Standard input, output and error are taken: what the plugin
// writes to os.Stdout afterwards is lost, the log is Config.Log, and package log goes there too. Where the system can, no
// other process may look into this one afterwards, and it leaves no core. Serve does not return.
func Serve(p Plugin) {
	if os.Getenv(CookieKey) != CookieValue {
		fmt.Fprintf(os.Stderr, "this is a plugin of muxproxy and is started by it; see `muxproxy plugin check %s`\n", os.Args[0])
		os.Exit(1)
	}
	log := zerolog.New(os.Stderr).With().Timestamp().Logger()
	if err := serve(p, log); err != nil {
		log.Error().Err(err).Msg("the plugin ends")
		os.Exit(1)
	}
	endGroup()
	os.Exit(0)
}

func serve(p Plugin, log zerolog.Logger) error {
	catchSIGPIPE()
	if err := harden(); err != nil {
		return err
	}
	hello, stdin, err := readHello(os.Stdin)
	if err != nil {
		return err
	}
	host, disconnect, err := NewHost(hello)
	if err != nil {
		return fmt.Errorf("host service: %w", err)
	}
	defer disconnect()
	stdlog.SetFlags(0)
	stdlog.SetOutput(log)

	var bad error
	var once sync.Once
	goplugin.Serve(&goplugin.ServeConfig{
		HandshakeConfig: goplugin.HandshakeConfig{MagicCookieKey: CookieKey, MagicCookieValue: CookieValue},
		VersionedPlugins: map[int]goplugin.PluginSet{ProtocolVersion: {
			"plugin": &served{register: func(s *grpc.Server) error {
				bad = Register(s, p, host, log)
				return bad
			}},
		}},
		GRPCServer: func(opts []grpc.ServerOption) *grpc.Server {
			s := grpc.NewServer(append(opts, Authorized(hello.PluginToken)...)...)
			once.Do(func() {
				// It lives as long as the process: when the master is gone, nothing is left to do.
				go func() {
					_, _ = io.Copy(io.Discard, stdin)
					s.Stop()
				}()
			})
			return s
		},
		Logger: hclog.NewNullLogger(), // all that matters comes back as an error, or is the master's to say
	})
	if bad != nil {
		return bad
	}
	if c, ok := p.(io.Closer); ok {
		closed := make(chan error, 1)
		go func() { closed <- c.Close() }()
		select {
		case err := <-closed:
			if err != nil {
				log.Warn().Err(err).Msg("close")
			}
		case <-time.After(closeTime):
			log.Warn().Msg("close takes too long")
		}
	}
	return nil
}

// readHello reads the first line, and returns where the rest comes from.
func readHello(in *os.File) (Hello, io.Reader, error) {
	late := time.AfterFunc(helloTime, func() {
		fmt.Fprintln(os.Stderr, "no first line on standard input: only a master of muxproxy starts plugins")
		os.Exit(1)
	})
	defer late.Stop()
	r := bufio.NewReaderSize(in, maxHello)
	line, err := r.ReadSlice('\n')
	if err != nil {
		return Hello{}, nil, fmt.Errorf("first line on standard input: %w", err)
	}
	var h Hello
	if err := json.Unmarshal(line, &h); err != nil {
		return Hello{}, nil, fmt.Errorf("first line on standard input: %w", err)
	}
	if h.HostToken == "" || h.PluginToken == "" {
		return Hello{}, nil, errors.New("first line on standard input: it lacks the tokens")
	}
	return h, r, nil
}

func sameToken(a, b string) bool { return subtle.ConstantTimeCompare([]byte(a), []byte(b)) == 1 }

// served is the plugin in go-plugin's terms.
type served struct {
	goplugin.NetRPCUnsupportedPlugin
	register func(*grpc.Server) error
}

func (p *served) GRPCServer(_ *goplugin.GRPCBroker, s *grpc.Server) error { return p.register(s) }

func (p *served) GRPCClient(context.Context, *goplugin.GRPCBroker, *grpc.ClientConn) (any, error) {
	return nil, errors.New("this is the plugin's side")
}
