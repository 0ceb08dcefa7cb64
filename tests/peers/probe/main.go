// Probe stands where an adapter will stand: it asks a real istiod for configuration and certificates and says what came back.
//
//	probe watch ...    one delta ADS stream per --pod, all over one connection; one line per response
//	probe csr ...      a certificate from istiod's CA for a key made here
package main

import (
	"fmt"
	"os"
)

func main() {
	commands := map[string]func([]string) error{"watch": watch, "csr": csr}
	if len(os.Args) < 2 || commands[os.Args[1]] == nil {
		fmt.Fprintln(os.Stderr, "usage: probe watch|csr FLAGS (-h lists them)")
		os.Exit(2)
	}
	if err := commands[os.Args[1]](os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "probe:", err)
		os.Exit(1)
	}
}
