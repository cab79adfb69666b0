host "*" {
  share = use.kind == "exec"
  via   = [client.cwd]
  confirm {}
  persist {
    when = client.tty != ""
  }
  forward {
    when = use.port == 1
    dynamic "127.0.0.1:1080" {}
  }
}
