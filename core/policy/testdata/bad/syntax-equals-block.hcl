master = {
  log_level = "info"
}
