host "*" {
  deny {
    when = client.env["X"] == 1 || client.env[use.name] == "x" || lookup(client.env, "X", "") == "x"
  }
}
