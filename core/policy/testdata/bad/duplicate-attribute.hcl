master {
  log_level = "info"
  log_level = "warn"
}
