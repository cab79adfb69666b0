plugin "Audit Mail" {
}
plugin "deny" {
}
