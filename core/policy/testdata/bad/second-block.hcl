master {
}
master {
}
plugin "other" {
}
plugin "other" {
}
