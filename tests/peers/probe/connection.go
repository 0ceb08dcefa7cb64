package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"flag"
	"fmt"
	"os"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
)

// istiod's certificate carries this name, whatever address it is reached by.
const istiodName = "istiod.istio-system.svc"

// A first answer of a large mesh passes gRPC's default of 4 MiB.
const largestMessage = 64 << 20

// connection is how istiod is reached: in clear text, over TLS, or over TLS with a client certificate.
type connection struct {
	address, root, cert, key, cluster string
}

func (c *connection) flags(set *flag.FlagSet) {
	set.StringVar(&c.address, "addr", "", "istiod's gRPC address")
	set.StringVar(&c.root, "root", "", "PEM file of istiod's root; without it the connection is clear text")
	set.StringVar(&c.cert, "cert", "", "PEM file of a client certificate chain")
	set.StringVar(&c.key, "key", "", "PEM file of its key")
	set.StringVar(&c.cluster, "cluster", "Kubernetes", "cluster id sent beside a token; istiod's node authorizer needs it")
}

func (c *connection) dial() (*grpc.ClientConn, error) {
	transport := insecure.NewCredentials()
	if c.root != "" {
		config, err := c.tls()
		if err != nil {
			return nil, err
		}
		transport = credentials.NewTLS(config)
	}
	return grpc.NewClient("passthrough:///"+c.address, grpc.WithTransportCredentials(transport),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(largestMessage)))
}

func (c *connection) tls() (*tls.Config, error) {
	pem, err := os.ReadFile(c.root)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s holds no certificate", c.root)
	}
	config := &tls.Config{RootCAs: roots, ServerName: istiodName, MinVersion: tls.VersionTLS12}
	if c.cert != "" {
		pair, err := tls.LoadX509KeyPair(c.cert, c.key)
		if err != nil {
			return nil, err
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return config, nil
}

// withToken puts the token of a file, and the cluster it is of, into the call's metadata; an empty name adds none.
func (c *connection) withToken(ctx context.Context, file string) (context.Context, error) {
	if file == "" {
		return ctx, nil
	}
	token, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+strings.TrimSpace(string(token)))
	if c.cluster != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "clusterid", c.cluster)
	}
	return ctx, nil
}
