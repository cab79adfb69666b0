host "*" {
  deny {
    when = contains([22, 80], use.program)
  }
  deny {
    when = contains(client.args, use.port)
  }
  deny {
    when = contains(["exec", "scp"], use.kind)
  }
  deny {
    when = contains(client.parents[*].ex, "/bin/sh")
  }
}
