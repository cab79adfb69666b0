package sshconfig

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

func TestHostNames(t *testing.T) {
	home, etc := t.TempDir(), t.TempDir()
	t.Setenv("HOME", home)
	write := func(path, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ssh := func(name string) string { return filepath.Join(home, ".ssh", name) }
	system := filepath.Join(etc, "ssh_config")
	write(ssh("config"), `
Include conf.d/*.conf ~/.ssh/more
Include config absent "unclosed
Include loop
# Host comment
Host *.example.com db !bad web? "quoted" a,b
    HostName hidden.example.com
  hOsT=equals  db # remark
Match host matched
Host open "quote
Host ""
`)
	write(ssh("conf.d/1.conf"), "Host one\n")
	write(ssh("conf.d/2.conf"), "Host two\r\nHost three\r\n")
	write(ssh("conf.d/3.other"), "Host other\n")
	write(ssh("more"), "Host more\nInclude deeper\n")
	write(ssh("deeper"), "Host deeper\n")
	write(ssh("loop"), "Include loop\nHost looped\n")
	write(system, "Include ssh_config.d/*\nHost sys\n")
	write(filepath.Join(etc, "ssh_config.d", "a"), "Host sysd\n")
	names := Names{Home: home, Env: os.LookupEnv}
	got := hostNames(names, system, "")
	want := []string{"a,b", "db", "deeper", "equals", "looped", "more", "one", "quoted", "sys", "sysd", "three", "two"}
	if !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	if got := hostNames(names, system, ssh("more")); !slices.Equal(got, []string{"deeper", "more"}) {
		t.Errorf("with a file: %q", got)
	}
	if got := hostNames(names, system, ssh("absent")); len(got) > 0 {
		t.Errorf("without one: %q", got)
	}
	// As deep as ssh goes, and no deeper.
	for i := range 20 {
		write(ssh("d"+strconv.Itoa(i)), "Host h"+strconv.Itoa(i)+"\nInclude d"+strconv.Itoa(i+1)+"\n")
	}
	if got := strings.Join(hostNames(names, system, ssh("d0")), " "); !strings.Contains(got, "h16") || strings.Contains(got, "h17") {
		t.Errorf("depth: %s", got)
	}
}
