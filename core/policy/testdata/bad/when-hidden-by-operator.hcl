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
  deny {
    when = use.kind == "exec" && matches("(", use.command)
  }
  deny {
    when = use.port == 22 ? matches("(", use.command) : matches("[", use.command)
  }
  deny {
    when = false && matches("(", use.command)
  }
}
