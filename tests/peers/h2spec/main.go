// H2spec runs every case of h2spec, the strict ones too, at 127.0.0.1:PORT and prints what came of each as lines for a program:
// `passed ID`, `skipped ID` or `failed ID: what was expected; what came`. What h2spec itself prints goes to stderr.
//
//	h2spec PORT [--tls]
package main

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/summerwind/h2spec/config"
	"github.com/summerwind/h2spec/generic"
	"github.com/summerwind/h2spec/hpack"
	"github.com/summerwind/h2spec/http2"
	"github.com/summerwind/h2spec/spec"
)

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "h2spec PORT [--tls]")
		os.Exit(2)
	}
	port, err := strconv.Atoi(os.Args[1])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	results := os.Stdout
	os.Stdout = os.Stderr
	tls := len(os.Args) > 2 && os.Args[2] == "--tls"
	// A case that expects nothing more waits for as long.
	c := &config.Config{Host: "127.0.0.1", Port: port, Path: "/", Timeout: 2 * time.Second, MaxHeaderLen: 4000, Strict: true, TLS: tls, Insecure: tls}
	for _, group := range []*spec.TestGroup{generic.Spec(), http2.Spec(), hpack.Spec()} {
		group.Test(c)
		tell(results, group)
	}
}

func tell(out io.Writer, group *spec.TestGroup) {
	for _, test := range append(group.Tests, group.StrictTests...) {
		result := test.Result
		if result == nil {
			continue
		}
		id := fmt.Sprintf("%s/%d", group.ID(), result.Sequence)
		switch {
		case result.Skipped:
			fmt.Fprintln(out, "skipped", id)
		case result.Failed:
			fmt.Fprintf(out, "failed %s: %s\n", id, strings.ReplaceAll(result.Error.Error(), "\n", "; "))
		default:
			fmt.Fprintln(out, "passed", id)
		}
	}
	for _, inner := range group.Groups {
		tell(out, inner)
	}
}
