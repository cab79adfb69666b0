package plugin

func harden() error { return nil }

func endGroup() {}

func catchSIGPIPE() {}
