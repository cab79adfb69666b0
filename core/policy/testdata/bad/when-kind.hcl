host "*" {
  deny {
    when = use.kind == "remote_forward"
  }
  deny {
    when = "sftp" != use.kind
  }
}
