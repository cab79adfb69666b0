master {
  exit_when_idle = "1 hour"
}
host "*" {
  confirm {
    timeout  = "forever"
    remember = "-5m"
    idle     = 10
  }
}
