plugin "audit-mail" {
  limits = { exec = "many" }
  on_failure = "ignore"
}
host "*" {
  audit-mail {
    subject = 1
    sender  = "x"
  }
}
