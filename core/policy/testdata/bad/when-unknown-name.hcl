host "*" {
  deny {
    when = usr.kind == "exec" || use.comand == "x" || client.exec == "y" || host.nam != "z"
  }
}
