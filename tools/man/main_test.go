package main

import (
	"strings"
	"testing"
	"time"
)

func TestRender(t *testing.T) {
	p := page{name: "x.y", section: "5", summary: "about it", version: "1.2", seeAlso: "ssh(1),z(7)", date: time.Unix(0, 0).UTC()}
	got := string(p.render("# Title\n\nText with `code-span`, [a link](other.md) and [there](#place).\n\n" +
		"## Plain \"words\"\n\n### block \"NAME\"\n\n" +
		"| attribute | type | default | who sees it | what it is |\n| --- | --- | --- | --- | --- |\n" +
		"| `a_b` | string | `\"x\"` | the gate | one; [two](#p) |\n| `c` | bool | `a\\|b` | the same | three |\n| | bool | 1 | me | four |\n\n" +
		"```sh\nls -l | cat [x](y)\n## no heading\n```\n"))
	for _, want := range []string{
		".TH X.Y 5 \"1970-01-01\" \"muxproxy 1.2\" \"File Formats\"\n.nh\n.ad l\n",
		".SH NAME\nx.y \\- about it\n", ".SH DESCRIPTION\n", "\\fBcode\\-span\\fR, a link and there.",
		".SH PLAIN \\(dqWORDS\\(dq\n", ".SS block \\(dqNAME\\(dq\n",
		".TP\n\\fBa_b\\fR\n(string; default \\fB\"x\"\\fR; for the gate) one; two\n",
		".TP\n\\fBc\\fR\n(bool; default \\fBa|b\\fR; for the gate) three\n", ".TP\n\\fBc\\fR\n(bool; default 1; for me) four\n",
		".EX\nls \\-l | cat [x](y)\n## no heading\n.EE\n.nh\n", ".SH SEE ALSO\n\\fBssh\\fP(1), \\fBz\\fP(7)\n",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	if strings.Contains(got, "Title") {
		t.Errorf("the title is in\n%s", got)
	}
}
