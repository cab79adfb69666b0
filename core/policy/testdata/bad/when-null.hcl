host "*" {
  deny {
    when = use.command == null
  }
  deny {
    when = null
  }
  confirm {
    ask     = null
    timeout = jsondecode("null")
  }
}
