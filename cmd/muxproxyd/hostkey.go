package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"

	"github.com/muxproxy/muxproxy/core/control"
	"github.com/muxproxy/muxproxy/core/use"
)

func newHostKey(a *app) *cobra.Command {
	var fingerprint bool
	cmd := &cobra.Command{
		Use:   "host-key [--fingerprint]",
		Short: "print the keys that the master shows to local clients",
		Long: `Prints the host keys that the master shows to local clients, one to a line, and
the line that its CA has in known_hosts. OpenSSH needs neither: ssh_config names
that file. Clients that know no host certificates (plink, dbclient, paramiko)
see a plain key. All keys are new at each start of the master.`,
		Example: "  muxproxy host-key --fingerprint",
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return runHostKey(cmd.Context(), a, fingerprint) },
	}
	cmd.Flags().BoolVar(&fingerprint, "fingerprint", false, "print SHA256 fingerprints instead")
	return cmd
}

func runHostKey(ctx context.Context, a *app, fingerprint bool) error {
	return a.withMaster(ctx, func(m *control.Master) error {
		plain, ca, err := m.HostKeys(ctx, false)
		if err != nil {
			return err
		}
		show := func(line, prefix, suffix string) error {
			if fingerprint {
				key, _, _, _, err := ssh.ParseAuthorizedKey([]byte(line))
				if err != nil {
					return fmt.Errorf("the master sent a key that can't be read: %w", err)
				}
				line, prefix = ssh.FingerprintSHA256(key)+" "+key.Type(), ""
			} else {
				suffix = ""
			}
			_, err := fmt.Fprintln(a.stdout, prefix+use.Printable(line)+suffix)
			return err
		}
		for _, key := range plain {
			if err := show(key, "", ""); err != nil {
				return err
			}
		}
		for _, key := range ca {
			if err := show(key, "@cert-authority * ", " (CA)"); err != nil {
				return err
			}
		}
		return nil
	})
}
