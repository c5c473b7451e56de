import java.io.ByteArrayInputStream;
import java.io.IOException;
import java.io.InputStream;
import java.io.OutputStream;
import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.net.HttpURLConnection;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.KeyStore;
import java.security.cert.Certificate;
import java.security.cert.CertificateFactory;
import javax.net.ssl.HttpsURLConnection;
import javax.net.ssl.SSLContext;
import javax.net.ssl.TrustManagerFactory;

/**
 * Posts zeros with the two HTTP clients that every JDK has. Reads lines of client, framing, bytes,
 * Content-Type and URL, with a tab between, and writes for each the status and the body of the
 * answer, or why there was none. Its argument, if any, is the certificate of an authority.
 */
public class Posts {
    private static final byte[] PIECE = new byte[1 << 16];

    public static void main(String[] arguments) throws Exception {
        SSLContext tls = arguments.length > 0 ? trusting(Path.of(arguments[0])) : SSLContext.getDefault();
        HttpsURLConnection.setDefaultSSLSocketFactory(tls.getSocketFactory());
        HttpClient client = HttpClient.newBuilder().sslContext(tls).build();
        BufferedReader lines = new BufferedReader(new InputStreamReader(System.in));
        for (String line = lines.readLine(); line != null; line = lines.readLine()) {
            String[] post = line.split("\t");
            long size = Long.parseLong(post[2]);
            String told;
            try {
                told = post[0].equals("HttpURLConnection")
                    ? byConnection(post[1], size, post[3], URI.create(post[4]))
                    : byClient(client, post[1], size, post[3], URI.create(post[4]));
            } catch (IOException error) {
                told = "no answer: " + error;
            }
            System.out.println(told.replaceAll("\\s", " "));
        }
    }

    private static String byConnection(String framing, long size, String type, URI url) throws IOException {
        HttpURLConnection post = (HttpURLConnection) url.toURL().openConnection();
        post.setRequestMethod("POST");
        post.setDoOutput(true);
        post.setRequestProperty("Content-Type", type);
        switch (framing) {
            case "length" -> post.setFixedLengthStreamingMode(size);
            case "chunks" -> post.setChunkedStreamingMode(PIECE.length);
            default -> { }  // it collects the body first
        }
        try (OutputStream body = post.getOutputStream()) {
            for (long sent = 0; sent < size; sent += PIECE.length) {
                body.write(PIECE, 0, (int) Math.min(PIECE.length, size - sent));
            }
        }
        int status = post.getResponseCode();
        InputStream said = status < 400 ? post.getInputStream() : post.getErrorStream();
        return status + " " + (said == null ? "" : new String(said.readAllBytes()));
    }

    private static String byClient(HttpClient client, String framing, long size, String type, URI url)
            throws IOException, InterruptedException {
        HttpRequest.BodyPublisher body = HttpRequest.BodyPublishers.ofInputStream(() -> new Zeros(size));
        if (framing.equals("length")) {
            body = HttpRequest.BodyPublishers.fromPublisher(body, size);
        }
        HttpRequest post = HttpRequest.newBuilder(url).header("Content-Type", type).POST(body).build();
        HttpResponse<String> answer = client.send(post, HttpResponse.BodyHandlers.ofString());
        return answer.statusCode() + " " + answer.body();
    }

    private static SSLContext trusting(Path authority) throws Exception {
        Certificate certificate = CertificateFactory.getInstance("X.509")
            .generateCertificate(new ByteArrayInputStream(Files.readAllBytes(authority)));
        KeyStore trusted = KeyStore.getInstance(KeyStore.getDefaultType());
        trusted.load(null, null);
        trusted.setCertificateEntry("authority", certificate);
        TrustManagerFactory trust = TrustManagerFactory.getInstance(TrustManagerFactory.getDefaultAlgorithm());
        trust.init(trusted);
        SSLContext tls = SSLContext.getInstance("TLS");
        tls.init(null, trust.getTrustManagers(), null);
        return tls;
    }

    private static class Zeros extends InputStream {
        private long left;

        Zeros(long size) {
            left = size;
        }

        @Override
        public int read() {
            return left-- > 0 ? 0 : -1;
        }

        @Override
        public int read(byte[] into, int offset, int length) {
            int count = (int) Math.min(length, left);
            left -= count;
            return count > 0 ? count : -1;
        }
    }
}
