master {
  loglevel = "info"
  audits   = "on"
}
