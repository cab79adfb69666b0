host "*" {
  deny {
    when = use.port == "22"
  }
  deny {
    when = use.command > 5
  }
  deny {
    when = client.args == "x"
  }
  deny {
    when = host.port == use.destination
  }
}
