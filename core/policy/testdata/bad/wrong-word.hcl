master {
  log_level      = "verbose"
  foreign        = true
  audit_commands = "ful"
  lock_on        = ["sleep", "lid"]
}
