host "*" {
  deny {
    when = length([for p in client.parents : p if p.exee == "/bin/sh"]) > 0
  }
  deny {
    when = length([for p in client.parents : p.exe + 1]) > 0
  }
  deny {
    when = length([for a in [1] : [for b in [1] : [for c in [1] : c]]]) > 0
  }
}
