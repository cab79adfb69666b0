host "*" {
  deny {
    when = match("x", use.command)
  }
  deny {
    when = matches("(", use.command)
  }
  deny {
    when = cidr("10.0.0.1/8", use.destination) || cidr("ten", use.destination)
  }
  deny {
    when = matches("x")
  }
  deny {
    when = glob(use.command)
  }
}
