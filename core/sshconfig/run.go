package sshconfig

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Parent is a running ssh.
type Parent struct {
	PID  int
	Exe  string   // absolute; "" if it can't be told or is gone
	Args []string // without argv[0]
}

// FromParents returns the arguments, without argv[0], of the ssh that started this process.
func FromParents() ([]string, bool) {
	p, ok := FindParent()
	return p.Args, ok
}

// Request is one question to `ssh -G`.
type Request struct {
	Args  Args   // the command line of the ssh that asks; zero: there is none
	User  string // %r
	Host  string // %h
	Port  uint16 // %p
	Alias string // %n; "": the destination of Args, else Host
	SSH   string // the executable; "": that of the ssh above this process, else ssh on PATH
}

// Run asks `ssh -G` what ssh_config means for a destination, in this process's environment and working directory, as if
// muxproxy's own lines were not there: ssh reads private copies of those files that have such lines.
//
// User, Host and Port of the request win over the answer, unless CanonicalizeHostname yes has made another name of the
// host: ssh leaves that to the proxy where it has one (resolve_canonicalize of ssh.c). They are passed to ssh only if
// Args has no destination: with one, the answer is the same without them, and Match user sees what the asking ssh saw.
//
// An error is a line for a person; it is the last thing ssh said, if ssh failed.
func Run(ctx context.Context, req Request) (*Resolved, error) {
	names, err := LocalNames()
	if err != nil {
		return nil, err
	}
	return resolve(ctx, req, names, systemConfig())
}

// resolve is Run for a given local user and system-wide file.
func resolve(ctx context.Context, req Request, names Names, system string) (*Resolved, error) {
	if req.Alias == "" {
		req.Alias = req.Args.Host()
	}
	if req.Alias == "" {
		req.Alias = req.Host
	}
	if req.Alias == "" {
		return nil, errors.New("no host name")
	}
	names.User, names.Host, names.Alias = req.User, req.Host, req.Alias
	if req.Port != 0 {
		names.Port = strconv.Itoa(int(req.Port))
	}

	c := &copier{
		names: names, includeHome: names.Home, system: system,
		seen: make(map[string]bool), set: make(map[string]bool), origin: make(map[string]string),
		done: make(map[source]string), busy: make(map[source]bool),
	}
	if home := os.Getenv("HOME"); home != "" {
		c.includeHome = home
	}
	defer func() {
		if c.dir != "" {
			os.RemoveAll(c.dir) // best effort: mode 0700, and nothing in it that the user's own files don't say
		}
	}()
	argv, err := c.argv(req)
	if err != nil {
		return nil, err
	}
	out, err := c.ask(ctx, req.SSH, argv)
	if err != nil {
		return nil, err
	}
	options, err := Parse(out)
	if err != nil {
		return nil, err
	}
	r := &Resolved{Options: options, Files: c.files}
	for k := range c.set {
		r.Set = append(r.Set, k)
	}
	slices.Sort(r.Set)
	if !canonicalized(r, req) {
		if req.User != "" {
			options["user"] = []string{req.User}
		}
		if req.Host != "" {
			options["hostname"] = []string{req.Host}
		}
		if req.Port != 0 {
			options["port"] = []string{names.Port}
		}
	}
	relative, err := r.expand(names)
	if err != nil {
		return nil, err
	}
	r.Volatile = c.volatile || relative
	return r, nil
}

// canonicalized reports whether the answer is about another name than the asking ssh gave, because that one did not
// look for the canonical name: with a ProxyCommand it does so only for CanonicalizeHostname always. Lines for the
// canonical name count in the answer and may set User and Port too. Without an ssh, or with another alias than its
// destination, the host need not be what the answer makes of the alias: then it stays as asked for.
func canonicalized(r *Resolved, req Request) bool {
	if req.Host == "" || req.Args.Destination == "" || req.Args.Host() != req.Alias {
		return false
	}
	switch r.Get("canonicalizehostname") {
	case "yes", "true":
		return !strings.EqualFold(strings.Trim(req.Host, "[]"), strings.Trim(r.Get("hostname"), "[]"))
	}
	return false
}

// argv is the command line of ssh -G, and walks the configuration for it.
func (c *copier) argv(req Request) ([]string, error) {
	argv := []string{"-G"}
	options := req.Args.forResolve()
	file, given := req.Args.configFile()
	if given && !strings.EqualFold(file, "none") && !filepath.IsAbs(file) {
		c.volatile = true
	}

	config := ""
	switch {
	case given && strings.EqualFold(file, "none"):
		config = "none"
	case given:
		path, err := c.copy(source{file, true, false}, false, 0)
		if err != nil {
			return nil, err
		}
		config = path
	default:
		path, err := c.userConfig()
		if err != nil {
			return nil, err
		}
		config = path
	}
	if config != "" {
		argv = append(argv, "-F", config)
	}

	dropped := false // a -o ProxyCommand of ours
	for i := 0; i < len(options); i++ {
		switch o := options[i]; o {
		case "-F":
			i++
		case "-o":
			i++
			word, rest, ok := keyword(options[i])
			if ok {
				c.note(word, rest)
			}
			switch {
			case word == "proxycommand" && ours(rest):
				dropped = true
			case word == "globalknownhostsfile":
				if kept, ours := withoutOurs(rest); !ours {
					argv = append(argv, o, options[i])
				} else if kept != "" {
					argv = append(argv, o, kept)
				}
			default:
				argv = append(argv, o, options[i])
			}
		case "-c", "-m", "-i", "-b", "-I":
			i++
			c.set[map[string]string{"-c": "ciphers", "-m": "macs", "-i": "identityfile", "-b": "bindaddress",
				"-I": "pkcs11provider"}[o]] = true
			argv = append(argv, o, options[i])
		default:
			argv = append(argv, o)
			if strings.IndexByte(argLetters, o[1]) >= 0 {
				i++
				argv = append(argv, options[i])
			}
		}
	}
	if dropped {
		argv = withoutFdpass(argv)
	}

	destination := req.Args.Destination
	if destination == "" || req.Args.Host() != req.Alias {
		destination = req.Alias
		// First come, first served in ssh: appended, they give way to the caller's own.
		if req.User != "" {
			argv = append(argv, "-l", req.User)
		}
		if req.Port != 0 {
			argv = append(argv, "-p", c.names.Port)
		}
	}
	argv = append(argv, "--", destination)
	return append(argv, req.Args.Command...), nil
}

func withoutFdpass(argv []string) []string {
	var out []string
	for i := 0; i < len(argv); i++ {
		if argv[i] == "-o" && i+1 < len(argv) {
			if word, _, ok := keyword(argv[i+1]); ok && word == "proxyusefdpass" {
				i++
				continue
			}
		}
		out = append(out, argv[i])
	}
	return out
}

// userConfig returns what -F should name instead of the default files; "" if they can be read as they are.
func (c *copier) userConfig() (string, error) {
	user := source{filepath.Join(c.names.Home, ".ssh", "config"), true, true}
	system := source{c.system, false, false}
	userPath, err := c.copy(user, false, 0)
	if err != nil {
		return "", err
	}
	systemPath, err := c.copy(system, false, 0)
	if err != nil {
		return "", err
	}
	if userPath == user.path && systemPath == system.path {
		return "", nil
	}
	// -F takes the place of both files. Unlike an included file the system-wide one is not subject to ssh's check of
	// owner and mode, so it always becomes a copy.
	if systemPath, err = c.copy(system, true, 0); err != nil {
		return "", err
	}
	text := ""
	if c.exists(user.path) {
		text = "Include " + quoteWord(escapeMeta(userPath)) + "\n"
	}
	if c.exists(system.path) {
		text += "Include " + quoteWord(escapeMeta(systemPath)) + "\n"
	}
	return c.write(text, user.path)
}

func (c *copier) exists(path string) bool {
	for _, s := range c.files {
		if s.Path == path {
			return !s.ModTime.IsZero()
		}
	}
	return false
}

// ask runs ssh.
func (c *copier) ask(ctx context.Context, ssh string, argv []string) ([]byte, error) {
	if ssh == "" {
		if p, ok := FindParent(); ok {
			ssh = p.Exe
		}
	}
	if ssh == "" {
		var err error
		if ssh, err = exec.LookPath("ssh"); err != nil {
			return nil, fmt.Errorf("no ssh on PATH to ask what ssh_config says: %w", err)
		}
	}
	cmd := exec.CommandContext(ctx, ssh, argv...)
	cmd.WaitDelay = 2 * time.Second // a Match exec can leave children that hold the pipes
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if err == nil || errors.Is(err, exec.ErrWaitDelay) {
		return out.Bytes(), nil
	}
	if ctx.Err() != nil {
		return nil, fmt.Errorf("ssh -G: %w", context.Cause(ctx))
	}
	if line := c.complaint(errs.String()); line != "" {
		return nil, errors.New(line)
	}
	return nil, fmt.Errorf("ssh -G: %w", err)
}

// complaint is the last line of ssh's stderr that says what is wrong, with the paths of copies put back.
func (c *copier) complaint(stderr string) string {
	last := ""
	for line := range strings.Lines(stderr) {
		line = strings.TrimSpace(line)
		switch {
		case strings.HasPrefix(line, "usage: ssh"):
			return "ssh does not take this command line"
		case line == "", strings.HasPrefix(line, "debug"), strings.HasPrefix(line, "Pseudo-terminal will not"):
		case strings.Contains(line, ": terminating, ") && last != "": // the line before names the option
		default:
			last = line
		}
	}
	for copied, original := range c.origin {
		// The number must end there: DIR/1 is a prefix of DIR/12.
		for _, end := range []string{" ", ":", "\"", "'"} {
			last = strings.ReplaceAll(last, copied+end, original+end)
		}
		if strings.HasSuffix(last, copied) {
			last = strings.TrimSuffix(last, copied) + original
		}
	}
	return last
}

// expand does to the paths what ssh does after it has printed them, and makes them absolute. relative says that a path
// depended on the working directory.
func (r *Resolved) expand(names Names) (relative bool, err error) {
	names.Key = r.Get("hostkeyalias")
	if jump := r.Get("proxyjump"); !strings.EqualFold(jump, "none") {
		names.Jump = jump
	}
	names.User, names.Host, names.Port = r.Get("user"), r.Get("hostname"), r.Get("port")
	// Two names of one host and port can be two machines to a ProxyCommand. User, host and port are in the key anyway.
	if command := r.Get("proxycommand"); command != "" {
		r.Options["proxycommand"] = []string{names.named(command)}
	}
	absolute := func(path string) (string, error) {
		if !filepath.IsAbs(path) {
			relative = true
		}
		return filepath.Abs(path)
	}
	each := func(keyword string, list []string, expand func(string) (string, error)) error {
		for i, path := range list {
			if path == "" || strings.EqualFold(path, "none") {
				continue
			}
			full, err := expand(path)
			if err == nil {
				full, err = absolute(full)
			}
			if err != nil {
				return fmt.Errorf("%s %w", keyword, err)
			}
			list[i] = full
		}
		return nil
	}
	for _, k := range []string{"identityfile", "certificatefile", "revokedhostkeys"} {
		if err := each(k, r.Options[k], names.path); err != nil {
			return false, err
		}
	}
	// ssh has expanded these already, but for ~ in the global list: a second time would eat a %% or $.
	for _, k := range []string{"userknownhostsfile", "globalknownhostsfile"} {
		if list := r.Options[k]; len(list) > 0 {
			r.Options[k] = splitPaths(list[0])
			if err := each(k, r.Options[k], names.tilde); err != nil {
				return false, err
			}
		}
	}
	switch agent := r.Get("identityagent"); {
	case agent == "", agent == "SSH_AUTH_SOCK", strings.EqualFold(agent, "none"):
	case strings.HasPrefix(agent, "$"):
		value, ok := "", false
		if names.Env != nil {
			value, ok = names.Env(agent[1:])
		}
		if !ok || value == "" {
			value = "none"
		}
		r.Options["identityagent"] = []string{value}
	default:
		if err := each("identityagent", r.Options["identityagent"], names.tilde); err != nil {
			return false, err
		}
	}
	return relative, nil
}

// offersKeys reports whether ssh would try publickey. Without it a user often has other rights than a key whose line in
// authorized_keys restricts it.
func (r *Resolved) offersKeys() bool {
	switch strings.ToLower(r.Get("pubkeyauthentication")) {
	case "no", "false":
		return false
	}
	preferred := r.Get("preferredauthentications")
	return preferred == "" || slices.Contains(strings.Split(preferred, ","), "publickey")
}

// sharingKey are the options that two clients must agree on to share a connection: where it leads, how it gets there,
// who logs in with what, and how carefully the host is checked.
var sharingKey = []string{
	"hostname", "port", "user", "proxyjump", "proxycommand", "proxyusefdpass",
	"identityfile", "identitiesonly", "identityagent", "certificatefile", "pkcs11provider",
	"hostkeyalias", "userknownhostsfile", "globalknownhostsfile", "knownhostscommand", "stricthostkeychecking",
	"revokedhostkeys", "nohostauthenticationforlocalhost", "casignaturealgorithms", "requiredrsasize",
	"bindaddress", "bindinterface", "addressfamily",
	"ciphers", "kexalgorithms", "macs", "hostkeyalgorithms",
}

// Key is the same for two answers exactly if their clients may share a connection, as far as ssh_config decides it. What
// only says how a person may be asked is not part of it: BatchMode and PasswordAuthentication no (Ansible's default) are for
// those who want to ride on what a person has logged in.
func (r *Resolved) Key() string {
	h := sha256.New()
	fmt.Fprintf(h, "%t\n", r.offersKeys())
	for _, k := range sharingKey {
		for _, v := range r.Options[k] {
			// Lengths, so that no value can pose as two.
			fmt.Fprintf(h, "%s %d %s\n", k, len(v), v)
		}
	}
	return hex.EncodeToString(h.Sum(nil))
}
