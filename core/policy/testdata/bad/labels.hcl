master "x" {
}
plugin {
}
host {
}
host "*" {
  deny "x" {}
  lane {}
  lane "fast" {}
  confirm "x" {}
}
