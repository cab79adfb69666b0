package use

// Lookup says what policy holds for a target. It does not change: a reload makes a new one.
type Lookup interface {
	// For returns what applies to t when c asks. A control use that is about no host has the zero Target.
	For(t Target, c Caller) Effective
}

// Effective is what policy says about one target and one caller. All of it may be used by many goroutines, and none of it
// waits for anything.
type Effective interface {
	// Share is false where policy wants clients to connect by themselves. It is true if that could not be found out:
	// then Deny denies, which a client that went by itself would not notice.
	Share() bool
	// Via are the jump hosts in the order in which they are passed; none set: as ssh_config says.
	Via() (hosts []string, set bool)
	// Deny returns the denial by the first deny block that holds for u, or by the first thing that could not be
	// evaluated; nil if policy has nothing against u.
	Deny(u Use) *Denied
	// Lane is "interactive" or "bulk" as a lane block says; "": none holds, and what runs decides.
	Lane(u Use) string
	// Block returns the number of the plugin's block that holds for u, as the plugin was told of it, and -1 if there is
	// none. A block that could not be evaluated is a denial.
	Block(plugin string, u Use) (id int, d *Denied)
}
