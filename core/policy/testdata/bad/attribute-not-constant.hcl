host "*" {
  deny {
    reason = "no ${use.kind} here"
  }
  confirm {
    ask = host.name == "x" ? "always" : "never"
  }
}
