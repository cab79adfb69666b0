host "*" {
  deny {
    when = use.kind == "exec" && use.kind == "shell" && (use.port == "1" || client.cwd == 2)
  }
  deny {
    when = use.port == 22 ? use.command == 1 : use.port == "x"
  }
  deny {
    when = "x" == client.tty ? 1 : true
  }
}
