master {
  ssh_config = "config"
}
plugin "audit-mail" {
  path   = "~bob/bin/x"
  sha256 = "abc"
  to     = ["x"]
  may    = ["observe", "everything"]
}
